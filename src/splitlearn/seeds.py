"""Randomness as a function of names: the same draw whatever was drawn before, in every engine and in a resumed run."""

from __future__ import annotations

from hashlib import blake2b

import torch


def derive(seed: int, *names: object) -> int:
    """Return the seed in [0, 2**63) that belongs to `names` under `seed`, e.g. `derive(0, "weights", "hidden1")`."""
    return int.from_bytes(blake2b(repr((seed, *names)).encode(), digest_size=8).digest(), "big") >> 1


def seed_draws(seed: int, device: torch.device) -> None:
    """`torch.manual_seed` for the CPU and `device` alone.

    For each kind of device that is not in use torch's own formats a stack trace, 2 ms in all under a Trainer.
    """
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)
