"""Whether what a learner is given fits together."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from types import CodeType, FunctionType
from zlib import crc32

import torch
from pytorch_lightning.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from splitlearn.errors import InputError, check_whole
from splitlearn.layout import Role
from splitlearn.network import SplitNetwork
from splitlearn.segment import are_same, run_twice


def check_settings(interval: str, clip_val: float | None, steps_per_execution: int, micro_batches: int) -> None:
    """Raises ValueError for a setting that is out of its range."""
    if interval not in ("epoch", "step"):
        raise ValueError(f"`scheduler.interval` (={interval}) must be epoch or step")
    if steps_per_execution < 1:
        raise ValueError(f"`steps_per_execution` (={steps_per_execution}) must be at least 1")
    check_whole("micro_batches", micro_batches)
    if clip_val is not None and clip_val < 0:
        raise ValueError(f"`trainer.gradient_clip_val` (={clip_val}) must not be negative; null clips nothing")


def check_accumulation(num_batches: int, turn: int | str) -> None:
    """Raises ValueError where gradients cannot add up over so many mini-batches of one turn."""
    check_whole("trainer.accumulate_grad_batches", num_batches)
    if num_batches > 1 and turn == "step":
        raise ValueError(
            f"`trainer.accumulate_grad_batches` (={num_batches}) does not fit `schedule.turn` (=step), where each "
            "step makes a mean of all Alices: take a larger `data.batch_size`"
        )
    if isinstance(turn, int) and turn % num_batches:
        raise ValueError(
            f"`trainer.accumulate_grad_batches` (={num_batches}) must divide `schedule.turn` (={turn}), since a turn "
            "ends in a step"
        )


def check_mode(monitor: str, mode: str, name: str) -> None:
    """Raises InputError for an accuracy of which the lowest counts, or a loss of which the highest does."""
    right = "max" if "accuracy" in monitor else "min" if "loss" in monitor else mode
    if mode != right:
        raise InputError(f"{name} (={mode}) takes the worst `{monitor}` for the best: take mode={right}")


def check_precision(scaler: torch.amp.GradScaler | None, deferred: Sequence[Role], at_once: Sequence[Role]) -> None:
    """Raises InputError where one gradient scale would have to serve two moments."""
    if scaler is not None and deferred and at_once:
        raise InputError(
            f"`trainer.precision` (=16-mixed) does not fit a schedule in which {', '.join(at_once)} may step while "
            f"gradients of {', '.join(deferred)} are still added up: take bf16-mixed"
        )


def check_loss(loss: nn.Module, output: Tensor, num_classes: int, known: bool) -> bool:
    """Return whether the loss draws random numbers.

    Raises ValueError for an output that has not a value per class, and for the wrong one of two losses. Of an output
    that is not `known` here, since another party computes it, only the shape counts.
    """
    if output.ndim != 2 or output.shape[1] != num_classes:
        raise ValueError(
            f"the model's output has shape {list(output.shape[1:])} per sample, the data {num_classes} classes: "
            f"end the model in a block with {num_classes} outputs"
        )
    weight = getattr(loss, "weight", None)
    if isinstance(weight, Tensor) and not bool((weight >= 0).all()):
        raise ValueError(f"`loss.weight` (={weight.tolist()}) must not be negative: 0 leaves a class out")
    if not known:
        return False
    draws = _try(loss, output)
    logs = torch.allclose(output.float().exp().sum(1), torch.ones(len(output)), atol=1e-3)
    if isinstance(loss, nn.NLLLoss) and not logs:
        cure = "end the model in LogSoftmax, or use CrossEntropyLoss"
        raise ValueError(f"`loss` (=NLLLoss) takes log-probabilities: {cure}")
    probabilities = torch.allclose(output.float().sum(1), torch.ones(len(output)), atol=1e-3)
    if isinstance(loss, nn.CrossEntropyLoss) and (logs or (probabilities and bool((output >= 0).all()))):
        cure = "drop the model's last Softmax, or use NLLLoss with LogSoftmax"
        raise ValueError(f"`loss` (=CrossEntropyLoss) takes logits: {cure}")
    return draws


def check_loss_trains_nothing(loss: nn.Module, network: SplitNetwork) -> None:
    """Raises ValueError for a loss that wants a gradient for more than the weights of the party that holds it."""
    holder = network.layout.stages[-1].role
    held = {id(parameter) for parameter in network.parameters_of(holder)}
    own = [name for name, parameter in loss.named_parameters() if parameter.requires_grad and id(parameter) not in held]
    if own:
        raise ValueError(
            f"`loss` (={type(loss).__name__}) has parameters to train, {', '.join(own)}, which no optimizer has: make "
            f"them a block of the model at {holder}, who holds the loss, or freeze them by requires_grad_(False)"
        )


def _try(loss: nn.Module, output: Tensor) -> bool:
    """Whether the loss draws random numbers, for what the network computes for a few rows and their labels.

    Raises ValueError for one that does not take that, and for one that twice makes different things of it. One that
    counts or keeps does so from training on: copies are tried.
    """
    name, rows = type(loss).__name__, output.detach().float().cpu().requires_grad_()
    labels = torch.arange(len(rows)) % rows.shape[1]
    cure = "take a loss of (output [N, classes], labels [N] int64), such as CrossEntropyLoss, or mend its options"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # torch only warns of shapes that it stretches to fit
            value, again, draws = run_twice(copy.deepcopy(loss), rows, labels)
    except Exception as error:  # whatever a user's own loss may raise
        shapes = f"an output of shape {list(rows.shape)} and labels of shape {list(labels.shape)}"
        raise ValueError(f"`loss` (={name}) does not take {shapes} ({error}): {cure}") from error
    if not isinstance(value, Tensor) or value.ndim:
        shape = f"shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"`loss` (={name}) must be one number, not of {shape}: {cure}")
    if not value.requires_grad:
        raise ValueError(f"`loss` (={name}) has no gradient with respect to the output: {cure}")
    if not are_same(value, again):
        raise ValueError(
            f"`loss` (={name}) makes different things of one output: it keeps state in an attribute, which no "
            "checkpoint has (make it a buffer, by register_buffer), or draws by numpy or Python's random (take torch's)"
        )
    return draws


def warn_of_raw_rows(network: SplitNetwork) -> None:
    """Warns where a party that plays here sends its rows on without a weight in front of the cut."""
    for stage in network.transparent():
        if network.wire.hosts(stage.role):
            rank_zero_warn(
                f"{stage.role} sends raw data: {', '.join(stage.blocks)}, all that she has before the cut, have no "
                "weights, so whoever receives it can read her rows: cut behind a block with weights"
            )


def check_kind(ours: Mapping[str, str], theirs: Mapping[str, str]) -> None:
    """Raises InputError where a checkpoint is of another run than the one that is to go on from it.

    Only what differs is named. What one of them has not at all, such as the momentum of another optimizer, goes without
    saying.
    """
    differing = [
        f"`{what}` is {theirs[what]} in the checkpoint and {value} here"
        for what, value in ours.items()
        if theirs.get(what, value) != value
    ]
    if differing:
        period = " (a cosine's `scheduler.scheduler.T_max` is trainer.max_epochs, unless it is given)"
        raise InputError(
            f"`ckpt` is of another run: {'; '.join(differing)}: resume with what the checkpoint has"
            f"{period if any('T_max' in told for told in differing) else ''}, or take `weights` "
            "in place of `ckpt` to start from its weights alone"
        )


def described(value: object) -> str:
    """One line that two objects of the same class and settings share, in whatever process they are."""
    if isinstance(value, partial):
        given = [*map(described, value.args), *(f"{name}={described(v)}" for name, v in value.keywords.items())]
        return f"{described(value.func)}({', '.join(given)})"
    if isinstance(value, nn.Module):
        settings = {name: v for name, v in vars(value).items() if name != "training" and name[0] != "_"}
        parts = {**settings, **value._parameters, **value._buffers, **value._modules}
        return f"{type(value).__name__}({', '.join(f'{name}={described(part)}' for name, part in parts.items())})"
    if isinstance(value, Tensor):
        return str(value.tolist())
    if isinstance(value, FunctionType) and value.__name__ == "<lambda>":  # all of them have this name
        code = value.__code__
        constants = [constant for constant in code.co_consts if not isinstance(constant, CodeType)]
        return f"<lambda> {crc32(repr((code.co_code, code.co_names, constants)).encode()):08x}"
    if isinstance(value, str | int | float | list | tuple | dict | None):
        return str(value)
    return str(getattr(value, "__qualname__", type(value).__name__))
