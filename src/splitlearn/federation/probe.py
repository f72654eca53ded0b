"""Why the hub is not reached, as far as the one who wants to join can tell."""

from __future__ import annotations

import base64
import errno
import ipaddress
import os
import socket
import ssl
from typing import NamedTuple
from urllib.parse import unquote, urlsplit
from urllib.request import getproxies_environment, proxy_bypass_environment  # type: ignore[attr-defined]

from splitlearn.errors import InputError, outside

PATIENCE = 3.0  # seconds for each answer
SETTINGS = 4  # the type of the frame by which HTTP/2, and hence gRPC, begins at both ends
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, SETTINGS, 0, 0, 0, 0, 0])
MOST_HEADERS = 2**14  # bytes of a proxy's answer
NOT_OF_HOST, EXPIRED, NOT_YET = 62, 10, 9  # X509_V_ERR_HOSTNAME_MISMATCH, _CERT_HAS_EXPIRED, _CERT_NOT_YET_VALID


class Fault(NamedTuple):
    """What is in the way, with the cure; `lasts` where waiting is hardly of use."""

    why: str
    lasts: bool = False


class ProxyError(OSError):
    """A proxy lets nobody through."""


def split(address: str) -> tuple[str, int]:
    """Return host and port of HOST:PORT; an IPv6 host stands in brackets there."""
    host, _, port = address.rpartition(":")
    return host.removeprefix("[").removesuffix("]"), int(port)


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def proxy_for(host: str) -> str | None:
    """Return the URL of the proxy that the environment names on the way to `host`; there is none to this machine.

    Raises InputError for one that gRPC cannot use.
    """
    proxies = getproxies_environment()
    url = next((proxies[kind] for kind in ("grpc", "https", "http") if kind in proxies), None)
    if url is None or is_loopback(host) or proxy_bypass_environment(host) or _in_a_network(host, proxies.get("no", "")):
        return None
    url = url if "://" in url else f"http://{url}"
    if urlsplit(url).scheme != "http" or not urlsplit(url).hostname:
        raise InputError(
            f"the proxy of the environment ({named(url)}) must be http://HOST:PORT for gRPC: set `grpc_proxy`, or name "
            f"{host} in `no_proxy`"
        )
    return url


def named(proxy: str) -> str:
    """Return what may be shown of a proxy's URL: a password may stand in it."""
    parts = urlsplit(proxy)
    return outside(f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}")


def find_fault(address: str, hub: str, ca: bytes | None, proxy: str | None) -> Fault:
    """Try what joining needs, step by step, and return the first thing that fails; of no fault `why` is empty.

    `ca`, PEM, is what the hub's certificate must be signed by; None talks in the clear.
    """
    host, _ = split(address)
    name = address if proxy is None else f"the proxy {named(proxy)}"
    try:
        with _connect(address, proxy) as connection:
            return Fault(_in_the_clear(connection, address, hub) if ca is None else _tls(connection, address, hub, ca))
    except ProxyError as error:
        return Fault(f"{name} does not let through to {address}: {error}; name {host} in `no_proxy`, or ask its keeper")
    except socket.gaierror:
        return Fault(f"the host of {name} is not known here: mend the name, or take the host's number", lasts=True)
    except ConnectionRefusedError:
        return Fault(f"nobody listens at {name}: start {hub}, or mend the address")
    except TimeoutError:
        return Fault(f"no answer comes from {name}: open the way to it, which a firewall may bar, or mend the address")
    except OSError as error:
        return Fault(f"{name} cannot be reached ({error.strerror or error}): mend the address, or the network")


def why_not_bound(address: str) -> str:
    """Return why nobody can listen at HOST:PORT here."""
    try:
        socket.create_server(split(address)).close()
    except OSError as error:
        return os.strerror(error.errno or 0) if error.errno in errno.errorcode else str(error.strerror)
    return "it was in use"


def _connect(address: str, proxy: str | None) -> socket.socket:
    if proxy is None:
        return socket.create_connection(split(address), PATIENCE)
    parts = urlsplit(proxy)
    connection = socket.create_connection((parts.hostname, parts.port or 80), PATIENCE)
    who = f"{unquote(parts.username or '')}:{unquote(parts.password or '')}".encode()
    proof = "" if parts.username is None else f"Proxy-Authorization: Basic {base64.b64encode(who).decode()}\r\n"
    connection.sendall(f"CONNECT {address} HTTP/1.1\r\nHost: {address}\r\n{proof}\r\n".encode())
    answer = b""
    while b"\r\n\r\n" not in answer and len(answer) < MOST_HEADERS and (part := connection.recv(1)):
        answer += part
    first = answer.partition(b"\r\n")[0].decode(errors="replace")
    if first.split(" ")[1:2] != ["200"]:
        connection.close()
        raise ProxyError(f"it answers `{outside(first, 80)}`")
    return connection


def _in_the_clear(connection: socket.socket, address: str, hub: str) -> str:
    connection.sendall(PREFACE)
    if _begins(connection):
        return ""
    return (
        f"what listens at {address} does not talk in the clear, as this party does: it is another service, or {hub} "
        "was started with wire=grpc"
    )


def _tls(connection: socket.socket, address: str, hub: str, ca: bytes) -> str:
    context = ssl.create_default_context(cadata=ca.decode())
    context.set_alpn_protocols(["h2"])
    try:
        with context.wrap_socket(connection, server_hostname=hub) as secured:
            if _begins(secured):
                return ""
            return (
                f"{hub} listens at {address} and does not take this party's certificate: have both certificates made "
                "by one CA, and see that none has expired or was withdrawn"
            )
    except ssl.SSLCertVerificationError as error:
        fault = {NOT_OF_HOST: f"of another party than {hub}", EXPIRED: "that has expired", NOT_YET: "not valid yet"}
        kind = fault.get(error.verify_code, "of another CA")
        return f"what listens at {address} shows a certificate {kind}: mend the address, or have both made by one CA"
    except (ssl.SSLError, ConnectionError):
        return f"what listens at {address} does not speak TLS: it is another service, or {hub} was started without"


def _begins(connection: socket.socket) -> bool:
    """Whether who is at the other end begins as gRPC does. One who first wants a certificate does not."""
    try:
        return connection.recv(9)[3:4] == bytes([SETTINGS])
    except (ssl.SSLError, ConnectionError):
        return False


def _in_a_network(host: str, networks: str) -> bool:
    """Whether `no_proxy` has a network, like 10.0.0.0/8, that the host's number lies in."""
    try:
        number = ipaddress.ip_address(host)
    except ValueError:
        return False
    return any(_contains(network.strip(), number) for network in networks.split(",") if "/" in network)


def _contains(network: str, number: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    try:
        return number in ipaddress.ip_network(network, strict=False)
    except ValueError:
        return False
