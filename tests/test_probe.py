"""Why the hub is not reached is told, and a proxy of the environment is on no way where it does not belong."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from stars import PATIENCE, Ends, load

from splitlearn.certificates import make_certificates
from splitlearn.errors import InputError
from splitlearn.federation.probe import find_fault, named, proxy_for, why_not_bound
from splitlearn.federation.wiring import GlooWiring, GrpcWiring

SECRET = "http://ann:secret@proxy.hospital:3128"
NOWHERE = "http://127.0.0.1:9"


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    for name in ("grpc", "https", "http", "no"):
        monkeypatch.delenv(f"{name}_proxy", raising=False)
        monkeypatch.delenv(f"{name}_PROXY".upper(), raising=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Certificates of two CAs, `ours` and `theirs`."""
    folder = tmp_path_factory.mktemp("certificates")
    for ca in ("ours", "theirs"):
        make_certificates(["bob", "alice0"], folder / ca)
    return folder


@contextmanager
def answering(text: bytes, times: int = 1) -> Iterator[int]:
    """A service that answers whatever it is asked so; yields its port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve():
            for _ in range(times):
                connection = listener.accept()[0]
                connection.recv(2**16)
                connection.sendall(text)
                connection.close()

        threading.Thread(target=serve, daemon=True).start()
        yield listener.getsockname()[1]


# ---- Proxies


@pytest.mark.parametrize("name", ["http_proxy", "https_proxy", "HTTPS_PROXY", "grpc_proxy"])
def test_only_grpc_to_another_host_goes_by_a_proxy(name, monkeypatch):
    monkeypatch.setenv(name, SECRET)
    assert GrpcWiring("c").proxy("bob.hospital:1") == SECRET
    assert GlooWiring().proxy("bob.hospital:1") is None
    for host in ("127.0.0.1", "127.8.8.8", "localhost", "[::1]"):
        assert GrpcWiring("c").proxy(f"{host}:1") is None


@pytest.mark.parametrize(
    ("without", "host", "goes"),
    [
        ("bob.hospital", "bob.hospital", False),
        (".hospital, other", "bob.hospital", False),
        ("*", "10.1.2.3", False),
        ("10.1.2.3", "10.1.2.3", False),
        ("10.0.0.0/8", "10.1.2.3", False),
        ("10.0.0.0/8,no/8", "11.1.2.3", True),
        ("10.0.0.0/8", "bob.hospital", True),
        ("other.hospital", "bob.hospital", True),
    ],
)
def test_no_proxy_is_honoured(without, host, goes, monkeypatch):
    monkeypatch.setenv("https_proxy", "proxy.hospital:3128")
    monkeypatch.setenv("no_proxy", without)
    assert proxy_for(host) == ("http://proxy.hospital:3128" if goes else None)


def test_a_proxy_that_grpc_cannot_use_is_refused_without_its_password(monkeypatch):
    monkeypatch.setenv("https_proxy", "socks5://ann:secret@proxy.hospital:1080")
    with pytest.raises(InputError, match=r"socks5://proxy.hospital:1080\) must be http://HOST:PORT") as refused:
        proxy_for("bob.hospital")
    assert "secret" not in str(refused.value)
    assert named(SECRET) == "http://proxy.hospital:3128"


def test_over_loopback_all_meet_whatever_proxy_is_set(monkeypatch):
    for name in ("http_proxy", "https_proxy", "grpc_proxy"):
        monkeypatch.setenv(name, NOWHERE)
    with Ends() as ends:
        ends.meet()


def test_grpc_goes_by_the_proxy_that_is_named():
    with Ends() as ends:
        hub = ends.hub()
        member = ends.member("alice0", 1, proxy=f"http://127.0.0.1:{tunnel(hub.port)}")  # nobody listens at port 1
        join = ends.pool.submit(member.join, {"party": "alice0"}, PATIENCE)
        hub.gather(["bob", "alice0"], lambda greeting: None, PATIENCE)
        hub.welcome({"party": "bob", "parties": ["bob", "alice0"]})
        assert join.result(PATIENCE)["party"] == "bob"


def tunnel(port: int) -> int:
    """A proxy that connects to `port`, whatever it is asked for."""
    listener = socket.create_server(("127.0.0.1", 0))

    def pump(source, sink):
        while chunk := source.recv(2**16):
            sink.sendall(chunk)

    def serve():
        near, far = listener.accept()[0], socket.create_connection(("127.0.0.1", port))
        assert near.recv(2**16).startswith(b"CONNECT 127.0.0.1:1 ")
        near.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        for ends in ((near, far), (far, near)):
            threading.Thread(target=pump, args=ends, daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    return listener.getsockname()[1]


def test_what_a_proxy_answers_is_told_and_not_its_password():
    with answering(b"HTTP/1.1 403 \x1b[31mForbidden\r\n\r\n", 3) as port:
        proxy = f"http://ann:secret@127.0.0.1:{port}"
        why = find_fault("bob.hospital:29400", "bob", None, proxy).why
        assert why.startswith(rf"the proxy http://127.0.0.1:{port} does not let through to bob.hospital:29400: ")
        assert r"`HTTP/1.1 403 \x1b[31mForbidden`" in why
        with Ends() as ends, pytest.raises(InputError, match="goes by the environment's proxy") as refused:
            ends.member("alice0", 29400, proxy=proxy).join({"party": "alice0"}, 1)
        assert "secret" not in str(refused.value) + why


# ---- Who is there


def test_nobody_another_service_and_another_wire_are_told_apart(folder):
    ours = load(folder / "ours", "bob")["bob"]
    with Ends() as ends, answering(b"HTTP/1.1 400 Bad Request\r\n\r\n", 2) as port:
        clear, secured = f"127.0.0.1:{ends.hub().port}", f"127.0.0.1:{ends.hub(identity=ours).port}"
        assert find_fault(clear, "bob", None, None).why == ""
        assert "nobody listens at 127.0.0.1:9: start bob" in find_fault("127.0.0.1:9", "bob", None, None).why
        for address in (f"127.0.0.1:{port}", secured):
            assert "does not talk in the clear" in find_fault(address, "bob", None, None).why
        for address in (f"127.0.0.1:{port}", clear):
            assert "does not speak TLS: it is another service" in find_fault(address, "bob", ours.ca, None).why


def test_who_listens_and_says_nothing_is_not_taken_for_another_service(folder, monkeypatch):
    """A slow way must not be told as a wrong certificate."""
    monkeypatch.setattr("splitlearn.federation.probe.PATIENCE", 0.2)
    ca = load(folder / "ours", "bob")["bob"].ca
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        for trusted in (None, ca):
            assert find_fault(address, "bob", trusted, None).why.startswith(f"no answer comes from {address}: open")


def test_certificates_that_do_not_fit_are_told_apart(folder):
    ours, theirs = (load(folder / ca, "bob", "alice0") for ca in ("ours", "theirs"))
    with Ends() as ends:
        address = f"127.0.0.1:{ends.hub(identity=ours['bob']).port}"
        assert "shows a certificate of another CA" in find_fault(address, "bob", theirs["bob"].ca, None).why
        assert "of another party than carol" in find_fault(address, "carol", ours["bob"].ca, None).why
        assert "does not take this party's certificate" in find_fault(address, "bob", ours["bob"].ca, None).why


def test_a_name_that_is_not_known_is_told_at_once_and_ends_soon(monkeypatch):
    def unknown(*_, **__):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    monkeypatch.setattr("splitlearn.federation.streams.UNKNOWN", 1.0)
    said = []
    with Ends() as ends:
        member = ends.member("alice0", 29400, host="bob.nowhere")
        member.say = said.append
        with pytest.raises(InputError, match=r"the host of bob.nowhere:29400 is not known here: mend the name"):
            member.join({"party": "alice0"}, 600)
    assert len(said) == 1


def test_why_an_address_cannot_be_listened_on():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert why_not_bound(f"127.0.0.1:{taken.getsockname()[1]}") == "Address already in use"
    assert why_not_bound("192.0.2.1:0") == "Cannot assign requested address"
