"""Who is who between organisations: a private CA, and a folder for each party with what proves its name.

`python -m splitlearn.certificates --parties bob alice0 alice1` makes them, `--revoke alice1` takes one back.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from splitlearn.errors import InputError

COMMAND = "python -m splitlearn.certificates"
PARTY_NAME = re.compile(r"[a-z][a-z0-9_-]{0,62}")  # longer is no label of a DNS name
CA, CA_CERTIFICATE, CA_KEY, CERTIFICATE, KEY = "ca", "ca.crt", "ca.key", "party.crt", "party.key"
REVOKED = "revoked"  # beside a certificate: serial numbers that are not admitted any more, a line each
CA_DAYS = 3650
SLACK = timedelta(hours=1)  # a party's clock may be behind that of the CA
USAGES = (
    *("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement"),
    *("key_cert_sign", "crl_sign", "encipher_only", "decipher_only"),
)


@dataclass(frozen=True)
class Identity:
    """What a party proves its name by: its certificate and key, and the CA that it trusts; all PEM.

    `revoked` are the serial numbers of certificates of that CA which it trusts no more.
    """

    party: str
    ca: bytes
    certificate: bytes
    key: bytes = field(repr=False)
    revoked: frozenset[int] = frozenset()

    @classmethod
    def load(cls, folder: str | Path, party: str) -> Identity:
        """Read the party's own folder.

        Raises InputError for a file that is missing or unreadable; for a certificate that is of another party, not
        valid now, revoked or not signed by the CA beside it; and for a key that does not belong to it, or that others
        can read.
        """
        cure = f"whoever keeps the CA makes it with `{COMMAND} --parties {party}`"
        ca, certificate, key = (_read(Path(folder) / name, cure) for name in (CA_CERTIFICATE, CERTIFICATE, KEY))
        revoked = _revoked(Path(folder) / REVOKED)
        check_certificate(certificate, ca, party, revoked)
        _check_key(Path(folder) / KEY, key, certificate)
        return cls(party, ca, certificate, key, revoked)


def name_of(certificate: bytes) -> str:
    """Return the party that a PEM certificate speaks for. Raises InputError when it names none, or several."""
    parsed = _parse(certificate)
    try:
        alternatives = parsed.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        common = [attribute.value for attribute in parsed.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
        names = alternatives.get_values_for_type(x509.DNSName)
    except (x509.ExtensionNotFound, ValueError) as error:
        raise InputError(f"a certificate speaks for no party ({error}): make one with `{COMMAND}`") from error
    if len(names) != 1 or common != names:
        raise InputError(f"a certificate for {common} and {names} must name one party: make one with `{COMMAND}`")
    return names[0]


def check_certificate(certificate: bytes, ca: bytes, party: str, revoked: Collection[int] = ()) -> None:
    """Raises InputError unless the certificate is valid now, signed by that CA, speaks for `party` and is not revoked.

    Certificates are PEM, `revoked` serial numbers.
    """
    parsed, authority = _parse(certificate), _parse(ca)
    try:
        parsed.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature) as error:
        cure = "take both from the same folder"
        raise InputError(f"the certificate shown for {party} is not signed by the run's CA: {cure}") from error
    if (name := name_of(certificate)) != party:
        raise InputError(f"the certificate is of {name}, and must be of {party}: take the one in {party}'s folder")
    _check_dates(f"the certificate of {party}", parsed)
    _check_dates("the certificate of the CA", authority)
    if parsed.serial_number in revoked:
        raise InputError(f"the certificate of {party} is revoked: whoever keeps the CA makes another with `{COMMAND}`")


def make_certificates(parties: Sequence[str], folder: Path, days: float = 365) -> None:
    """Write a folder for each party below `folder`, signed by the CA in `folder`/ca, which is made when there is none.

    They are valid for as many days, at most ten years; negative ones have expired, which is for tests. Raises
    InputError for a name that cannot be used, a party that has a folder, and a CA that cannot be used, before it writes
    anything.
    """
    _check_parties(parties, folder)
    if not abs(days) <= CA_DAYS:
        raise InputError(f"`days` (={days}) must be at most {CA_DAYS}: the CA lasts no longer")
    if (folder / CA).exists():
        ca, key = _load_ca(folder / CA)
    else:
        ca, key = _make_ca()
        _write(folder / CA, {CA_CERTIFICATE: _pem(ca), CA_KEY: _private_pem(key)})
    for party in parties:
        _write(folder / party, _make_party(party, days, ca, key))
        if (folder / CA / REVOKED).exists():
            _write(folder / party, {REVOKED: _read(folder / CA / REVOKED, "")})


def make_identities(parties: Sequence[str]) -> dict[str, Identity]:
    """Return an identity for each party, for one run: no key is ever written, and the CA's is kept by nobody."""
    ca, key = _make_ca()
    made = {party: _make_party(party, CA_DAYS, ca, key) for party in parties}
    return {p: Identity(p, own[CA_CERTIFICATE], own[CERTIFICATE], own[KEY]) for p, own in made.items()}


def revoke(parties: Sequence[str], folder: Path) -> None:
    """Add the certificates of these parties to the lists beside the CA and beside every party in `folder`.

    Raises InputError, before it writes anything, where one of them has no certificate there of that CA.
    """
    cure = "put the party.crt that is to be revoked there"
    ca = _read(folder / CA / CA_CERTIFICATE, "--folder must have the CA")
    certificates = {party: _parse(_read(folder / party / CERTIFICATE, cure)) for party in parties}
    for party, certificate in certificates.items():
        if certificate.issuer != _parse(ca).subject:
            raise InputError(f"{folder / party / CERTIFICATE} must be of the CA in {folder / CA}: {cure}")
    revoked = _revoked(folder / CA / REVOKED) | {certificate.serial_number for certificate in certificates.values()}
    lines = "".join(f"{serial:x}\n" for serial in sorted(revoked)).encode()
    for known in (folder / CA, *(path.parent for path in folder.glob(f"*/{CERTIFICATE}"))):
        (known / REVOKED).write_bytes(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog=COMMAND, description="Make certificates for the parties of a run.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--parties", nargs="+", help="to make certificates for, e.g. bob alice0 alice1")
    what.add_argument("--revoke", nargs="+", metavar="PARTY", help="whose certificates are to be admitted no more")
    parser.add_argument("--folder", type=Path, default=Path("certificates"), help="default: certificates")
    parser.add_argument("--days", type=float, default=365, help="for which they are valid; default: 365")
    args = parser.parse_args(argv)
    try:
        if args.revoke:
            revoke(args.revoke, args.folder)
        else:
            make_certificates(args.parties, args.folder, args.days)
    except (InputError, OSError) as error:
        sys.exit(f"splitlearn: {error}")
    if args.revoke:
        print(f"{args.folder / CA / REVOKED}: hand it to all, Bob first, who put it beside their party.crt")
        return
    for party in args.parties:
        print(f"{args.folder / party}: hand it to {party}, and to nobody else")
    print(f"{args.folder / CA}: keep it. Whoever has ca.key can pose as any party, so hand it to nobody")


def _check_parties(parties: Sequence[str], folder: Path) -> None:
    for party in parties:
        if not PARTY_NAME.fullmatch(party) or party == CA:
            rule = "a small letter, then small letters, digits, _ and -, at most 63 in all, and not ca"
            raise InputError(f"a party's name (={party!r}) must be {rule}: e.g. alice0")
        if parties.count(party) > 1:
            raise InputError(f"a party's name (={party}) must be given once: leave the second out")
        if (folder / party).exists():
            raise InputError(f"{folder / party} must not exist: remove it first, or name another party or --folder")


def _check_dates(what: str, certificate: x509.Certificate) -> None:
    start, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if _now() < start:
        raise InputError(f"{what} is not valid before {start:%Y-%m-%d %H:%M} UTC: check this machine's clock")
    if _now() > end:
        raise InputError(f"{what} expired on {end:%Y-%m-%d %H:%M} UTC: make another with `{COMMAND}`")


def _check_key(path: Path, key: bytes, certificate: bytes) -> PrivateKeyTypes:
    try:
        private = serialization.load_pem_private_key(key, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise InputError(f"{path} must be a PEM key without a password: make one with `{COMMAND}`") from error
    if private.public_key() != _parse(certificate).public_key():
        raise InputError(f"{path} does not belong to the certificate beside it: take both from the same folder")
    if os.name == "posix" and (mode := path.stat().st_mode & 0o777) & 0o077:
        raise InputError(f"{path} (of mode {mode:o}) must be readable by its owner alone: `chmod 600 {path}`")
    return private


def _read(path: Path, cure: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): {cure}") from error


def _revoked(path: Path) -> frozenset[int]:
    if not path.exists():
        return frozenset()
    try:
        return frozenset(int(line, 16) for line in _read(path, "make it readable").decode().split())
    except ValueError as error:
        cure = f"make it with `{COMMAND} --revoke`"
        raise InputError(f"{path} must have a serial number, hexadecimal, on each line: {cure}") from error


def _parse(certificate: bytes) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(certificate)
    except ValueError as error:
        raise InputError(f"a certificate is not PEM ({error}): make one with `{COMMAND}`") from error


def _load_ca(folder: Path) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    cure = "without it no party can be added, so choose another --folder"
    certificate, key = (_read(folder / name, cure) for name in (CA_CERTIFICATE, CA_KEY))
    private, parsed = _check_key(folder / CA_KEY, key, certificate), _parse(certificate)
    _check_dates(f"the CA in {folder}", parsed)
    if not isinstance(private, ec.EllipticCurvePrivateKey):
        raise InputError(f"{folder / CA_KEY} must be a key on an elliptic curve: choose another --folder")
    return parsed, private


def _make_ca() -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    key, name = ec.generate_private_key(ec.SECP256R1()), _named("splitlearn CA")
    builder = _builder(name, key, CA_DAYS, name, key).add_extension(x509.BasicConstraints(True, 0), critical=True)
    return builder.add_extension(_usage("key_cert_sign", "crl_sign"), critical=True).sign(key, hashes.SHA256()), key


def _make_party(party: str, days: float, ca: x509.Certificate, ca_key: ec.EllipticCurvePrivateKey) -> dict[str, bytes]:
    """Return the content of the party's folder, by name."""
    key = ec.generate_private_key(ec.SECP256R1())
    builder = _builder(_named(party), key, days, ca.subject, ca_key, ca.not_valid_after_utc)
    both = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    for extension, critical in (
        (x509.BasicConstraints(False, None), True),
        (_usage("digital_signature", "key_agreement"), True),
        (x509.ExtendedKeyUsage(both), False),
        (x509.SubjectAlternativeName([x509.DNSName(party)]), False),
    ):
        builder = builder.add_extension(extension, critical)
    certificate = builder.sign(ca_key, hashes.SHA256())
    return {CA_CERTIFICATE: _pem(ca), CERTIFICATE: _pem(certificate), KEY: _private_pem(key)}


def _builder(
    subject: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    days: float,
    issuer: x509.Name,
    issuer_key: ec.EllipticCurvePrivateKey,
    latest: datetime | None = None,
) -> x509.CertificateBuilder:
    end = _now() + timedelta(days=days)
    end = end if latest is None else min(end, latest)
    authority = x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key())
    builder = x509.CertificateBuilder(issuer, subject, key.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(min(_now(), end) - SLACK).not_valid_after(end)
    builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    return builder.add_extension(authority, critical=False)


def _usage(*uses: str) -> x509.KeyUsage:
    return x509.KeyUsage(**{usage: usage in uses for usage in USAGES})


def _named(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    plain = serialization.NoEncryption()
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain)


def _write(folder: Path, files: dict[str, bytes]) -> None:
    folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    for name, content in files.items():
        mode = 0o600 if name.endswith(".key") else 0o644
        with os.fdopen(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            file.write(content)


def _now() -> datetime:
    return datetime.now(timezone.utc)


if __name__ == "__main__":
    main()
