"""What is sealed opens for one party only, unaltered."""

from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from splitlearn.certificates import Identity, make_certificates
from splitlearn.errors import InputError
from splitlearn.federation.frame import SEAL_BYTES
from splitlearn.federation.sealing import Seal, SealError

RUN, HEAD, WEIGHTS = bytes(range(16)), b"head", b"weights" * 99


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sealing")
    make_certificates(["alice0", "alice1", "bob"], folder / "ours")
    make_certificates(["alice1"], folder / "theirs")
    return folder


def seal(folder: Path, party: str, peer: str, run: bytes = RUN) -> Seal:
    own = Identity.load(folder / "ours" / party, party)
    return Seal(own, (folder / "ours" / peer / "party.crt").read_bytes(), peer, run)


@pytest.fixture
def sender(folder) -> Seal:
    return seal(folder, "alice0", "alice1")


@pytest.fixture
def receiver(folder) -> Seal:
    return seal(folder, "alice1", "alice0")


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
@pytest.mark.parametrize("payload", [b"", WEIGHTS])
def test_what_is_sealed_opens_and_is_28_bytes_longer(sender, receiver, payload, kind):
    sealed = sender.seal(kind(payload), HEAD)
    assert len(sealed) == len(payload) + 28 == len(payload) + SEAL_BYTES
    assert receiver.open(kind(sealed), HEAD) == payload


def test_both_ways_and_never_the_same(sender, receiver):
    assert sender.open(receiver.seal(WEIGHTS, HEAD), HEAD) == WEIGHTS
    assert sender.seal(WEIGHTS, HEAD) != sender.seal(WEIGHTS, HEAD)


def test_a_third_party_cannot_open_it(folder, sender):
    sealed = sender.seal(WEIGHTS, HEAD)
    assert b"weights" not in sealed
    for peer in ("alice0", "alice1"):
        with pytest.raises(SealError, match=f"a message cannot be opened as {peer}'s to bob"):
            seal(folder, "bob", peer).open(sealed, HEAD)


def test_a_third_party_cannot_pass_for_the_sender(folder, receiver):
    with pytest.raises(SealError, match="cannot be opened as alice0's to alice1"):
        receiver.open(seal(folder, "bob", "alice1").seal(WEIGHTS, HEAD), HEAD)


def test_an_altered_bit_is_refused(sender, receiver):
    sealed = sender.seal(b"weights", HEAD)
    for place in range(8 * len(sealed)):
        altered = bytearray(sealed)
        altered[place // 8] ^= 1 << place % 8
        with pytest.raises(SealError, match="it or its head was altered"):
            receiver.open(altered, HEAD)


def test_an_altered_head_is_refused(sender, receiver):
    with pytest.raises(SealError, match="it or its head was altered"):
        receiver.open(sender.seal(WEIGHTS, HEAD), b"heap")


@pytest.mark.parametrize("length", [0, 12, 27])
def test_a_stub_is_refused(sender, receiver, length):
    with pytest.raises(SealError, match=f"it has {length} bytes, and must have 28 or more"):
        receiver.open(sender.seal(WEIGHTS, HEAD)[:length], HEAD)


def test_a_message_is_no_answer_to_itself(sender):
    with pytest.raises(SealError, match="cannot be opened as alice1's to alice0"):
        sender.open(sender.seal(WEIGHTS, HEAD), HEAD)


def test_what_another_run_sealed_is_refused(folder, sender):
    with pytest.raises(SealError, match="or another run"):
        seal(folder, "alice1", "alice0", bytes(16)).open(sender.seal(WEIGHTS, HEAD), HEAD)


def test_a_peer_of_another_ca_is_refused(folder):
    own, theirs = Identity.load(folder / "ours/alice0", "alice0"), folder / "theirs/alice1/party.crt"
    with pytest.raises(InputError, match="the certificate shown for alice1 is not signed by the run's CA"):
        Seal(own, theirs.read_bytes(), "alice1", RUN)


def test_a_peer_of_another_name_is_refused(folder):
    own, bobs = Identity.load(folder / "ours/alice0", "alice0"), folder / "ours/bob/party.crt"
    with pytest.raises(InputError, match="the certificate is of bob, and must be of alice1"):
        Seal(own, bobs.read_bytes(), "alice1", RUN)


def test_a_party_does_not_seal_for_itself(folder):
    with pytest.raises(InputError, match=r"`peer` \(=alice0\) must be another party"):
        seal(folder, "alice0", "alice0")


def test_a_key_on_another_curve_is_refused(folder):
    own = Identity.load(folder / "ours/alice0", "alice0")
    key = ec.generate_private_key(ec.SECP384R1())
    bobs = x509.load_pem_x509_certificate((folder / "ours/bob/party.crt").read_bytes())
    signing = serialization.load_pem_private_key((folder / "ours/ca/ca.key").read_bytes(), password=None)
    builder = x509.CertificateBuilder(bobs.issuer, bobs.subject, key.public_key(), 1)
    builder = builder.not_valid_before(bobs.not_valid_before_utc).not_valid_after(bobs.not_valid_after_utc)
    names = bobs.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    certificate = builder.add_extension(names, critical=False).sign(signing, hashes.SHA256())
    with pytest.raises(InputError, match="the key of bob must be on the curve P-256"):
        Seal(own, certificate.public_bytes(serialization.Encoding.PEM), "bob", RUN)
