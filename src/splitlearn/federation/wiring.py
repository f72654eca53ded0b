"""What lies between the processes of a run: how their streams are secured, and what carries the frames."""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

from splitlearn.certificates import Identity
from splitlearn.errors import InputError
from splitlearn.federation.hub import Hub
from splitlearn.federation.probe import is_loopback, proxy_for, split
from splitlearn.federation.sealing import Seal
from splitlearn.federation.streams import Member, Streams
from splitlearn.federation.transports import FOREVER, Gloo, Grpc, Nccl, Transport
from splitlearn.layout import Party

LARGEST_MESSAGE = 2**31 - 2**20


class Wiring:
    """Streams in the clear."""

    nonce = b""

    def identity(self, party: Party) -> Identity | None:
        """Certificate and key of `party` for mutual TLS; None in the clear."""
        return None

    def check(self, address: str) -> None:
        """Raises InputError for an address that this wiring must not be used at."""

    def proxy(self, address: str) -> str | None:
        """The proxy by way of which the hub at `address` is joined, if any; none in a network that one trusts."""
        return None

    def check_size(self, num_bytes: int) -> None:
        """Raises InputError where a message may be too large."""
        if num_bytes > LARGEST_MESSAGE:
            raise InputError(
                f"a message may have {num_bytes:,} bytes, and gRPC takes {LARGEST_MESSAGE:,}: lower `data.batch_size` "
                "and `data.eval_batch_size`, cut elsewhere, or take wire=gloo"
            )

    def offer(self, star: Streams) -> dict[str, Any]:
        """What the hub tells all in its welcome."""
        return {}

    def gpu(self, party: Party, device: torch.device) -> str | None:
        """Which GPU `party` computes on, where the others must know. Raises InputError where it must be one."""
        return None

    def check_gpus(self, gpus: Mapping[Party, str | None]) -> None:
        """Raises InputError for two parties on one GPU that must not be."""

    def transport(self, star: Streams, welcome: Mapping[str, Any], device: torch.device) -> Transport:
        """What brings frames to and from `device`."""
        return Grpc(star)

    def seals(self, star: Streams, welcome: Mapping[str, Any]) -> dict[Party, Seal]:
        """For those whose frames go by way of the hub."""
        return {}


class GlooWiring(Wiring):
    """torch.distributed's gloo, in the clear: for a network that one trusts. No frame goes over the streams."""

    def check(self, address: str) -> None:
        host = address.rpartition(":")[0]
        if ":" in host or host == "0.0.0.0":
            raise InputError(
                f"`engine.address` (={address}) must name this host by an IPv4 address or name that the others reach, "
                "since gloo does: take that, or wire=grpc"
            )

    def check_size(self, num_bytes: int) -> None:
        """gloo takes any."""

    def offer(self, star: Streams) -> dict[str, Any]:
        assert isinstance(star, Hub)
        # A store of its own for each attempt: an old one would hand out the addresses of the dead.
        # It would listen on every interface if it were not given a socket.
        listener = socket.create_server((star.host, 0))
        port = listener.getsockname()[1]
        self.store = dist.TCPStore(
            star.host,
            port,
            is_master=True,
            wait_for_workers=False,
            timeout=timedelta(seconds=60),
            master_listen_fd=listener.detach(),
        )
        return {"store": self.store.port}

    def transport(self, star: Streams, welcome: Mapping[str, Any], device: torch.device) -> Transport:
        return Gloo(*self._meeting(star, welcome), pinned=device.type == "cuda")

    def _meeting(self, star: Streams, welcome: Mapping[str, Any]) -> tuple[Party, Sequence[Party], dist.Store, str]:
        if isinstance(star, Hub):
            return star.party, star.parties, self.store, star.host
        assert isinstance(star, Member)
        host = star.address.rpartition(":")[0]
        store = dist.TCPStore(host, welcome["store"], is_master=False, timeout=timedelta(seconds=60))
        return star.party, star.parties, store, star.local_host


class NcclWiring(GlooWiring):
    """NCCL from GPU to GPU, where every party has one of its own; the rest by gloo. For a network that one trusts."""

    direct = "cuda"

    def gpu(self, party: Party, device: torch.device) -> str | None:
        if device.type != self.direct:
            raise InputError(
                f"`wire` (=nccl) goes from GPU to GPU, and {party} computes on {device.type}: set "
                "`trainer.accelerator=gpu` where there is one, or take wire=gloo"
            )
        return str(torch.cuda.get_device_properties(device).uuid)

    def check_gpus(self, gpus: Mapping[Party, str | None]) -> None:
        for party, gpu in gpus.items():
            other = next(first for first in gpus if gpus[first] == gpu)
            if other != party:
                raise InputError(
                    f"`wire` (=nccl) takes a GPU for each party, and {other} and {party} are on the same, {gpu}: start "
                    "fewer parties on this host, or one by one with its own `trainer.devices=[1]`, or take wire=gloo"
                )

    def transport(self, star: Streams, welcome: Mapping[str, Any], device: torch.device) -> Transport:
        party, parties, store, host = self._meeting(star, welcome)
        group = self._group(dist.PrefixStore("beside", store), parties.index(party), len(parties))
        return Nccl(party, parties, store, host, group=group, device=device)

    def _group(self, store: dist.Store, rank: int, size: int) -> Any:
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")  # that a party is lost shows in the streams
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = FOREVER  # what an Alice sends may wait until it is her turn
        return dist.ProcessGroupNCCL(store, rank, size, options)


class GrpcWiring(Wiring):
    """gRPC streams with mutual TLS; frames that go by way of the hub are sealed for whom they are for.

    Arguments:
        certificates: the party's folder, made by `python -m splitlearn.certificates`.
        tls: False talks in the clear, on loopback alone.
    """

    def __init__(self, certificates: str | None = None, tls: bool | str = True) -> None:
        if tls not in (True, False, "on", "off"):
            raise InputError(f"`wire.tls` (={tls}) must be true or false")
        self.certificates, self.tls = certificates, tls in (True, "on")
        self.mine: Identity | None = None  # may be given: one that was made for the run
        self.nonce = secrets.token_bytes(16)

    @property
    def needs_certificates(self) -> bool:
        return self.tls and self.certificates is None

    def identity(self, party: Party) -> Identity | None:
        if not self.tls or self.mine is not None:
            return self.mine
        if self.certificates is None:
            raise InputError(
                "`wire.certificates` must name the folder of this party's certificate: make one for each party by "
                "`python -m splitlearn.certificates --parties ...`"
            )
        self.mine = Identity.load(Path(self.certificates), party)
        return self.mine

    def check(self, address: str) -> None:
        if not self.tls and not is_loopback(split(address)[0]):
            raise InputError(
                f"`wire.tls` (=off) talks in the clear, on loopback alone, not at {address}: leave it out, and give "
                "each party its certificate by `wire.certificates`"
            )

    def proxy(self, address: str) -> str | None:
        return proxy_for(split(address)[0])

    def seals(self, star: Streams, welcome: Mapping[str, Any]) -> dict[Party, Seal]:
        hub, *members = star.parties
        if self.mine is None or star.party == hub:
            return {}
        # With a number of each end, so that the hub cannot play again what was sealed in an earlier attempt.
        nonces = {**welcome["nonces"], star.party: self.nonce.hex()}
        return {
            other: Seal(self.mine, welcome["certificates"][other].encode(), other, _salt(welcome, nonces, star, other))
            for other in members
            if other != star.party
        }


def _salt(welcome: Mapping[str, Any], nonces: Mapping[Party, str], star: Streams, other: Party) -> bytes:
    return bytes.fromhex(welcome["run"] + "".join(nonces[party] for party in sorted((star.party, other))))
