"""The network between two parties: how long a message takes."""

from __future__ import annotations

import math
import re

BITS_PER_SECOND = {
    **{"bit/s": 1, "kbit/s": 1e3, "Mbit/s": 1e6, "Gbit/s": 1e9},
    **{"B/s": 8, "kB/s": 8e3, "MB/s": 8e6, "GB/s": 8e9},
}
SECONDS = {"s": 1, "ms": 1e-3, "us": 1e-6}
SERVES = ("one", "all")
NUMBER_AND_UNIT = re.compile(r"(-?\d+\.?\d*(?:e[+-]?\d+)?) ?([A-Za-z/]+)")


class Link:
    """What every two parties have between them, each pair its own, the same in both directions.

    Arguments:
        bandwidth: e.g. `10Mbit/s`, above 0. Units: bit/s, kbit/s, Mbit/s, Gbit/s; B/s, kB/s, MB/s, GB/s of 8 bits.
        latency: of each message, one way, e.g. `20ms`. Units: s, ms, us.
        loss: the share of the bits that are lost and sent again, in [0, 1).
        serves: how many Alices a server (any party that is no Alice) serves at a time: `one`, first come first served,
            or `all`.
    """

    def __init__(self, bandwidth: str, latency: str = "0ms", loss: float = 0.0, serves: str = "one") -> None:
        self.bandwidth, self.latency, self.loss, self.serves = bandwidth, latency, loss, serves
        bits_per_second = _parse("link.bandwidth", bandwidth, BITS_PER_SECOND, "10Mbit/s")
        self.delay = _parse("link.latency", latency, SECONDS, "20ms")
        if bits_per_second <= 0:
            raise ValueError(f"`link.bandwidth` (={bandwidth}) must be above 0: link=none predicts no time")
        if self.delay < 0:
            raise ValueError(f"`link.latency` (={latency}) must not be negative: 0ms is no latency")
        if isinstance(loss, bool) or not isinstance(loss, int | float) or not 0 <= loss < 1:
            raise ValueError(f"`link.loss` (={loss}) must lie in [0, 1), e.g. 0.01: with 1 nothing ever arrives")
        if serves not in SERVES:
            raise ValueError(f"`link.serves` (={serves}) must be one of {', '.join(SERVES)}")
        self.bits_per_second = bits_per_second * (1 - loss)

    @property
    def settings(self) -> dict[str, str | float]:
        return {"bandwidth": self.bandwidth, "latency": self.latency, "loss": self.loss, "serves": self.serves}

    def occupied(self, num_bytes: int) -> float:
        """Return the seconds for which a message keeps others from the same connection."""
        return 8 * num_bytes / self.bits_per_second

    def seconds(self, num_bytes: int) -> float:
        """Return the seconds from the moment a message is sent until all of it has arrived."""
        return self.delay + self.occupied(num_bytes)


def make_link(bandwidth: str | None, latency: str = "0ms", loss: float = 0.0, serves: str = "one") -> Link | None:
    """Return the link, or None where no bandwidth is given."""
    link = Link("1bit/s" if bandwidth is None else bandwidth, latency, loss, serves)
    if bandwidth is not None:
        return link
    if (link.delay, loss, serves) != (0, 0, "one"):
        raise ValueError("`link.bandwidth` (=None) must be given with any other setting of `link`, e.g. 10Mbit/s")
    return None


def _parse(name: str, value: object, units: dict[str, float], example: str) -> float:
    match = NUMBER_AND_UNIT.fullmatch(value) if isinstance(value, str) else None
    number = float(match[1]) if match else math.inf
    if match is None or match[2] not in units or not math.isfinite(number):
        raise ValueError(f"`{name}` (={value}) must be a number and one of {', '.join(units)}: e.g. {example}")
    return number * units[match[2]]
