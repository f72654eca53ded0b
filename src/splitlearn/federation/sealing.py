"""Weights that go from one Alice to the next by way of Bob, who must not read them.

That is the centralised mode of Gupta & Raskar 2018 (arXiv 1810.06060), in which weights are left encrypted with a
server.
"""

from __future__ import annotations

import os

from cryptography import x509
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from splitlearn.certificates import Identity, check_certificate
from splitlearn.errors import InputError
from splitlearn.federation.frame import SEAL_BYTES, Bytes

NONCE_BYTES, KEY_BYTES = 12, 32


class SealError(RuntimeError):
    """A sealed message was altered on the way, or is not from this sender to this receiver in this run."""


class Seal:
    """What two parties, and nobody between them, can read: AES-256-GCM.

    The key follows from the keys of their two certificates (ECDH on P-256, HKDF-SHA256) and from the run. One CA signed
    both certificates, so each knows the other. There is no forward secrecy: whoever obtains the key of either
    certificate can read all that was ever sealed between the two.

    Arguments:
        identity: of this party.
        peer_certificate: of the other party, PEM.
        peer: the name that it must speak for.
        run: the run's own bytes: what was sealed in another run does not open.

    Raises InputError for a certificate that is not the peer's, is not valid now, is revoked, is of another CA or has no
    P-256 key.
    """

    def __init__(self, identity: Identity, peer_certificate: bytes, peer: str, run: bytes) -> None:
        if peer == identity.party:
            raise InputError(f"`peer` (={peer}) must be another party than the one that seals: name the receiver")
        check_certificate(peer_certificate, identity.ca, peer, identity.revoked)
        self.party, self.peer = identity.party, peer
        shared = _private_key(identity).exchange(ec.ECDH(), _public_key(peer_certificate, peer))
        names = "\0".join(("splitlearn seal", *sorted((self.party, peer))))
        self._cipher = AESGCM(HKDF(hashes.SHA256(), KEY_BYTES, salt=run, info=names.encode()).derive(shared))

    def seal(self, payload: Bytes, head: bytes) -> bytes:
        """Return nonce, ciphertext and tag: 28 bytes more than `payload`, of which there may be up to 2**31 - 1.

        `head` stays readable, goes beside it, and must be the same for `open`.
        """
        nonce = os.urandom(NONCE_BYTES)
        return nonce + self._cipher.encrypt(nonce, payload, _bound(self.party, head))

    def open(self, sealed: Bytes, head: bytes) -> bytes:
        """Return what the peer sealed. Raises SealError for anything else."""
        fault = f"a message cannot be opened as {self.peer}'s to {self.party}"
        if len(sealed) < SEAL_BYTES:
            raise SealError(f"{fault}: it has {len(sealed)} bytes, and must have {SEAL_BYTES} or more")
        view = memoryview(sealed)
        try:
            return self._cipher.decrypt(view[:NONCE_BYTES], view[NONCE_BYTES:], _bound(self.peer, head))
        except InvalidTag as error:
            raise SealError(f"{fault}: it or its head was altered, or it is of other parties or another run") from error


def _bound(sender: str, head: bytes) -> bytes:
    """The direction is bound in too: both seal by one key, and a message must not pass for an answer to itself."""
    return sender.encode() + b"\0" + head


def _private_key(identity: Identity) -> ec.EllipticCurvePrivateKey:
    key = serialization.load_pem_private_key(identity.key, password=None)
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        raise _no_key(identity.party)
    return key


def _public_key(certificate: bytes, party: str) -> ec.EllipticCurvePublicKey:
    key = x509.load_pem_x509_certificate(certificate).public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise _no_key(party)
    return key


def _no_key(party: str) -> InputError:
    cure = "make it with `python -m splitlearn.certificates`"
    return InputError(f"the key of {party} must be on the curve P-256, which weights are sealed with: {cure}")
