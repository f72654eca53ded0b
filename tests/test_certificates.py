"""Certificates say who is who, and say it to nobody else."""

import os
import ssl
import stat
import subprocess
import sys
from contextlib import suppress
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from splitlearn import certificates
from splitlearn.certificates import (
    Identity,
    check_certificate,
    main,
    make_certificates,
    make_identities,
    name_of,
    revoke,
)
from splitlearn.errors import InputError


@pytest.fixture(scope="session")
def made(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "certificates"
    make_certificates(["bob", "alice0"], folder)
    return folder


@pytest.fixture
def folder(tmp_path) -> Path:
    make_certificates(["bob", "alice0"], tmp_path)
    return tmp_path


def later(monkeypatch, days: float) -> None:
    monkeypatch.setattr(certificates, "_now", lambda: datetime.now(timezone.utc) + timedelta(days=days))


def parsed(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def extension(certificate: x509.Certificate, kind: type) -> x509.ExtensionType:
    return certificate.extensions.get_extension_for_class(kind).value


def named(common: str, alternatives: list[str] | None) -> bytes:
    """A certificate that signs itself and names whom it likes."""
    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])
    now = datetime.now(timezone.utc)
    builder = x509.CertificateBuilder(name, name, key.public_key(), 1, now, now + timedelta(days=1))
    if alternatives is not None:
        names = x509.SubjectAlternativeName([x509.DNSName(alternative) for alternative in alternatives])
        builder = builder.add_extension(names, critical=False)
    return certificates._pem(builder.sign(key, hashes.SHA256()))


def test_each_party_has_a_folder_of_its_own(made):
    files = sorted(str(path.relative_to(made)) for path in made.rglob("*") if path.is_file())
    parties = [f"{party}/{name}" for party in ("alice0", "bob") for name in ("ca.crt", "party.crt", "party.key")]
    assert files == sorted([*parties, "ca/ca.crt", "ca/ca.key"])
    assert (made / "bob/ca.crt").read_bytes() == (made / "ca/ca.crt").read_bytes()


def test_nobody_else_reads_keys(made):
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in (made, *made.rglob("*"))}
    assert {modes[path] for path in modes if path.is_dir()} == {0o700}
    assert {modes[path] for path in modes if path.suffix == ".key"} == {0o600}


def test_a_certificate_speaks_for_one_party_at_either_end(made):
    certificate = parsed(made / "alice0/party.crt")
    assert name_of((made / "alice0/party.crt").read_bytes()) == "alice0"
    assert list(extension(certificate, x509.SubjectAlternativeName)) == [x509.DNSName("alice0")]
    usages = {ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH}
    assert set(extension(certificate, x509.ExtendedKeyUsage)) == usages
    assert not extension(certificate, x509.BasicConstraints).ca
    assert isinstance(certificate.public_key().curve, ec.SECP256R1)
    assert certificate.not_valid_after_utc - datetime.now(timezone.utc) > timedelta(days=364)


def test_the_ca_signs_parties_and_no_other_ca(made):
    constraints = extension(parsed(made / "ca/ca.crt"), x509.BasicConstraints)
    assert (constraints.ca, constraints.path_length) == (True, 0)


def test_an_identity_is_what_lies_in_the_folder(made):
    identity = Identity.load(str(made / "bob"), "bob")
    assert identity.party == "bob"
    assert identity.certificate == (made / "bob/party.crt").read_bytes()
    assert "PRIVATE" not in repr(identity)


def context(made: Path, party: str, purpose: ssl.Purpose) -> ssl.SSLContext:
    context = ssl.create_default_context(purpose, cafile=str(made / party / "ca.crt"))
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_cert_chain(made / party / "party.crt", made / party / "party.key")
    return context


def shake_hands(made: Path, host: str) -> ssl.SSLObject:
    """Let alice0 call bob, whom she takes for `host`. Returns Bob's end."""
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    bob = context(made, "bob", ssl.Purpose.CLIENT_AUTH).wrap_bio(up, down, server_side=True)
    alice = context(made, "alice0", ssl.Purpose.SERVER_AUTH).wrap_bio(down, up, server_hostname=host)
    for end in (alice, bob, alice, bob):
        with suppress(ssl.SSLWantReadError):
            end.do_handshake()
    return bob


def test_tls_takes_the_certificates(made):
    assert shake_hands(made, "bob").getpeercert()["subjectAltName"] == (("DNS", "alice0"),)


def test_tls_minds_the_name(made):
    with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        shake_hands(made, "carol")


def test_a_party_is_added_by_the_same_ca(folder):
    make_certificates(["carol"], folder)
    ca = (folder / "bob/ca.crt").read_bytes()
    check_certificate(Identity.load(folder / "carol", "carol").certificate, ca, "carol")


def test_a_party_is_not_made_twice(folder):
    before = (folder / "bob/party.key").read_bytes()
    with pytest.raises(InputError, match="bob must not exist: remove it first"):
        make_certificates(["carol", "bob"], folder)
    assert (folder / "bob/party.key").read_bytes() == before
    assert not (folder / "carol").exists()


@pytest.mark.parametrize("party", ["", "Bob", "0bob", "../bob", "bob smith", "bob\n", "ca", "a" * 64, "*", "bob.com"])
def test_a_name_that_is_none_is_refused(tmp_path, party):
    with pytest.raises(InputError, match=r"a party's name \(=.*\) must be a small letter"):
        make_certificates(["alice0", party], tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_name_given_twice_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"\(=bob\) must be given once"):
        make_certificates(["bob", "alice0", "bob"], tmp_path)


@pytest.mark.parametrize("days", [float("nan"), float("inf"), 1e9])
def test_days_without_end_are_refused(tmp_path, days):
    with pytest.raises(InputError, match=r"`days` \(=.*\) must be at most 3650"):
        make_certificates(["bob"], tmp_path, days)


@pytest.mark.parametrize("name", ["ca.crt", "party.crt", "party.key"])
def test_a_file_that_is_missing_is_named_with_what_makes_it(folder, name):
    (folder / "bob" / name).unlink()
    command = "python -m splitlearn.certificates --parties bob"
    with pytest.raises(InputError, match=rf"bob/{name} cannot be read \(No such file or directory\): .*{command}"):
        Identity.load(folder / "bob", "bob")


def test_a_folder_that_is_missing_is_named_with_what_makes_it(made):
    with pytest.raises(InputError, match=r"dave/ca.crt cannot be read .*--parties dave"):
        Identity.load(made / "dave", "dave")


def test_a_certificate_of_another_party_is_refused(made):
    with pytest.raises(InputError, match="the certificate is of bob, and must be of alice0"):
        Identity.load(made / "bob", "alice0")


def test_a_certificate_that_expired_is_refused(folder):
    make_certificates(["carol"], folder, days=-1)
    yesterday = datetime.now(timezone.utc) - timedelta(days=1)
    with pytest.raises(InputError, match=f"the certificate of carol expired on {yesterday:%Y-%m-%d}"):
        Identity.load(folder / "carol", "carol")


def test_a_certificate_of_the_future_is_refused(made, monkeypatch):
    later(monkeypatch, -2)
    with pytest.raises(InputError, match=r"the certificate of bob is not valid before 20.* check this machine's clock"):
        Identity.load(made / "bob", "bob")


def test_a_clock_that_is_a_little_behind_is_no_matter(made, monkeypatch):
    later(monkeypatch, -0.5 / 24)
    Identity.load(made / "bob", "bob")


def test_a_party_added_late_does_not_outlive_the_ca(folder, monkeypatch):
    later(monkeypatch, 3500)
    make_certificates(["carol"], folder)
    assert parsed(folder / "carol/party.crt").not_valid_after_utc == parsed(folder / "ca/ca.crt").not_valid_after_utc
    later(monkeypatch, 3651)
    with pytest.raises(InputError, match=r"the CA in .* expired on 20"):
        make_certificates(["dave"], folder)


def test_a_certificate_of_another_ca_is_refused(folder, made):
    (folder / "bob/ca.crt").write_bytes((made / "ca/ca.crt").read_bytes())
    with pytest.raises(InputError, match="the certificate shown for bob is not signed by the run's CA"):
        Identity.load(folder / "bob", "bob")


def test_a_party_cannot_sign_for_another(made):
    alice, bob = ((made / party / "party.crt").read_bytes() for party in ("alice0", "bob"))
    with pytest.raises(InputError, match="is not signed by the run's CA"):
        check_certificate(alice, bob, "alice0")


def test_a_key_that_does_not_belong_to_the_certificate_is_refused(folder):
    (folder / "bob/party.key").write_bytes((folder / "alice0/party.key").read_bytes())
    with pytest.raises(InputError, match=r"bob/party.key does not belong to the certificate beside it"):
        Identity.load(folder / "bob", "bob")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ca.crt", "a certificate is not PEM"),
        ("party.crt", "a certificate is not PEM"),
        ("party.key", "party.key must be a PEM key without a password"),
    ],
)
def test_what_is_no_pem_is_refused(folder, name, message):
    (folder / "bob" / name).write_bytes(b"-----BEGIN NOISE-----")
    with pytest.raises(InputError, match=message):
        Identity.load(folder / "bob", "bob")


@pytest.mark.parametrize("name", ["ca.crt", "ca.key"])
def test_a_ca_without_its_key_adds_nobody(folder, name):
    (folder / "ca" / name).unlink()
    with pytest.raises(InputError, match=rf"ca/{name} cannot be read .* choose another --folder"):
        make_certificates(["carol"], folder)


@pytest.mark.parametrize(
    ("common", "alternatives", "message"),
    [
        ("bob", None, "a certificate speaks for no party"),
        ("bob", ["bob", "alice0"], "must name one party"),
        ("bob", ["alice0"], "must name one party"),
    ],
)
def test_a_certificate_that_names_no_party_or_several_is_refused(common, alternatives, message):
    with pytest.raises(InputError, match=message):
        name_of(named(common, alternatives))


def test_the_ca_itself_speaks_for_no_party(made):
    ca = (made / "ca/ca.crt").read_bytes()
    with pytest.raises(InputError, match="speaks for no party"):
        check_certificate(ca, ca, "bob")


def test_the_command_says_whom_to_hand_what_and_refuses_the_second_time(tmp_path):
    command = [sys.executable, "-m", "splitlearn.certificates", "--parties", "bob", "alice0", "--folder", "keys"]
    first, second = (subprocess.run(command, cwd=tmp_path, capture_output=True, text=True) for _ in range(2))
    assert (first.returncode, first.stderr) == (0, "")
    assert first.stdout.splitlines() == [
        f"keys{os.sep}bob: hand it to bob, and to nobody else",
        f"keys{os.sep}alice0: hand it to alice0, and to nobody else",
        f"keys{os.sep}ca: keep it. Whoever has ca.key can pose as any party, so hand it to nobody",
    ]
    assert Identity.load(tmp_path / "keys/bob", "bob").party == "bob"
    assert (second.returncode, second.stdout) == (1, "")
    assert second.stderr == "splitlearn: keys/bob must not exist: remove it first, or name another party or --folder\n"


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o644])
def test_a_key_that_others_can_read_is_refused(folder, mode):
    (folder / "bob/party.key").chmod(mode)
    with pytest.raises(
        InputError, match=rf"bob/party.key \(of mode {mode:o}\) must be .*: `chmod 600 .*bob/party.key`"
    ):
        Identity.load(folder / "bob", "bob")
    (folder / "ca/ca.key").chmod(mode)
    with pytest.raises(InputError, match=r"`chmod 600 .*ca/ca.key`"):
        make_certificates(["carol"], folder)


def test_the_ca_itself_must_be_valid_now(monkeypatch):
    monkeypatch.setattr(certificates, "CA_DAYS", -1)
    ca, ca_key = certificates._make_ca()
    key = ec.generate_private_key(ec.SECP256R1())
    builder = certificates._builder(certificates._named("bob"), key, 1, ca.subject, ca_key)
    builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName("bob")]), critical=False)
    certificate = certificates._pem(builder.sign(ca_key, hashes.SHA256()))
    with pytest.raises(InputError, match="the certificate of the CA expired on 20"):
        check_certificate(certificate, certificates._pem(ca), "bob")


def test_who_is_revoked_is_refused_by_all_and_others_are_not(folder, capsys):
    main(["--revoke", "alice0", "--folder", str(folder)])
    assert "hand it to all, Bob first" in capsys.readouterr().out
    bob = Identity.load(folder / "bob", "bob")
    assert bob.revoked == {parsed(folder / "alice0/party.crt").serial_number}
    with pytest.raises(InputError, match="the certificate of alice0 is revoked: "):
        Identity.load(folder / "alice0", "alice0")
    with pytest.raises(InputError, match="the certificate of alice0 is revoked: "):
        check_certificate((folder / "alice0/party.crt").read_bytes(), bob.ca, "alice0", bob.revoked)


def test_who_is_added_after_a_revocation_knows_of_it_and_a_new_certificate_of_that_name_counts(folder):
    revoke(["alice0"], folder)
    (folder / "alice0").rename(folder.parent / "old")
    make_certificates(["alice0"], folder)
    alice = Identity.load(folder / "alice0", "alice0")
    assert alice.revoked == Identity.load(folder / "bob", "bob").revoked != frozenset()
    check_certificate(alice.certificate, alice.ca, "alice0", alice.revoked)


def test_a_list_of_revoked_that_is_none_is_refused(folder):
    (folder / "bob/revoked").write_text("alice0\n")
    with pytest.raises(InputError, match="bob/revoked must have a serial number, hexadecimal, on each line"):
        Identity.load(folder / "bob", "bob")


def test_nobody_is_revoked_whose_certificate_is_not_there(folder):
    with pytest.raises(InputError, match=r"carol/party.crt cannot be read .*: put the party.crt"):
        revoke(["bob", "carol"], folder)
    assert not list(folder.rglob("revoked"))


def test_identities_of_one_run_prove_their_names_and_are_never_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made, others = make_identities(["bob", "alice0"]), make_identities(["bob"])
    for party, identity in made.items():
        check_certificate(identity.certificate, made["bob"].ca, party)
        assert identity.party == party
        assert identity.key.decode() not in repr(identity)
    with pytest.raises(InputError, match="is not signed by the run's CA"):
        check_certificate(made["bob"].certificate, others["bob"].ca, "bob")
    assert list(tmp_path.iterdir()) == []
