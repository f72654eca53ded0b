"""Whether what a learner is given fits together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from splitlearn.errors import InputError
from splitlearn.layout import Role


def check_settings(interval: str, clip_val: float | None, steps_per_execution: int) -> None:
    """Raises ValueError for a setting that is out of its range."""
    if interval not in ("epoch", "step"):
        raise ValueError(f"`scheduler.interval` (={interval}) must be epoch or step")
    if steps_per_execution < 1:
        raise ValueError(f"`steps_per_execution` (={steps_per_execution}) must be at least 1")
    if clip_val is not None and clip_val < 0:
        raise ValueError(f"`trainer.gradient_clip_val` (={clip_val}) must not be negative; null clips nothing")


def check_precision(scaler: torch.amp.GradScaler | None, deferred: Sequence[Role], at_once: Sequence[Role]) -> None:
    """Raises InputError where one gradient scale would have to serve two moments."""
    if scaler is not None and deferred and at_once:
        raise InputError(
            f"`trainer.precision` (=16-mixed) does not fit a schedule in which {', '.join(at_once)} may step while "
            f"gradients of {', '.join(deferred)} are still added up: take bf16-mixed"
        )


def check_loss(loss: nn.Module, output: Tensor, num_classes: int) -> None:
    """Raises ValueError for an output that has not a value per class, and for the wrong one of two losses."""
    if output.ndim != 2 or output.shape[1] != num_classes:
        raise ValueError(
            f"the model's output has shape {list(output.shape[1:])} per sample, the data {num_classes} classes: "
            f"end the model in a block with {num_classes} outputs"
        )
    logs = torch.allclose(output.float().exp().sum(1), torch.ones(len(output)), atol=1e-3)
    if isinstance(loss, nn.NLLLoss) and not logs:
        cure = "end the model in LogSoftmax, or use CrossEntropyLoss"
        raise ValueError(f"`loss` (=NLLLoss) takes log-probabilities: {cure}")
    probabilities = torch.allclose(output.float().sum(1), torch.ones(len(output)), atol=1e-3)
    if isinstance(loss, nn.CrossEntropyLoss) and (logs or (probabilities and bool((output >= 0).all()))):
        cure = "drop the model's last Softmax, or use NLLLoss with LogSoftmax"
        raise ValueError(f"`loss` (=CrossEntropyLoss) takes logits: {cure}")
