"""The weights in a model folder: one file that holds tensors by name and nothing else, so that reading runs no code."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping
from hashlib import blake2b
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors import torch as safetensors
from torch import Tensor, nn

from splitlearn.errors import InputError, told_if_full
from splitlearn.saved.manifest import Manifest
from splitlearn.segment import Segment

WEIGHTS = "weights.safetensors"
FEW = 3  # of what does not fit, so many are named


def write_whole(path: Path, content: str | bytes, key: str = "hydra.run.dir") -> None:
    """Under another name first: nobody reads half of a file, and who dies in the middle leaves the old one.

    Raises InputError where it cannot be written; `key` of the configuration moves it.
    """
    unfinished = path.with_name(f"{path.name}.tmp")
    with told_if_full(path, key):
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, str):
            unfinished.write_text(content)
        else:
            unfinished.write_bytes(content)
        unfinished.replace(path)


def write_weights(folder: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write the weights, each tensor by itself also where two are tied. Return the file's digest."""
    copies = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    content = safetensors.save(copies)
    write_whole(folder / WEIGHTS, content)
    return _digest(content)


def share_weights(folder: Path, other: Path) -> None:
    """Give `folder` the weights of another one, at no cost where the file system has links."""
    path = folder / WEIGHTS
    with told_if_full(path):
        folder.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        try:
            os.link(other / WEIGHTS, path)
        except OSError:
            shutil.copyfile(other / WEIGHTS, path)


def read_weights(folder: Path, manifest: Manifest) -> dict[str, Tensor]:
    """Return the weights by name, on the CPU. Raises InputError where they are stale, missing, damaged or others."""
    if manifest.stale:
        raise InputError(
            f"{folder} is stale: {manifest.weights['trained_at']} has what is trained of {manifest.role}; take the "
            "folder of that party, or train with final=all"
        )
    path = folder / WEIGHTS
    if not path.is_file():
        raise InputError(f"{folder} has no {WEIGHTS}: take the folder as the run left it")
    content = path.read_bytes()
    try:
        tensors = safetensors.load(content)
    except SafetensorError as error:
        raise InputError(f"{path} is damaged ({error}): take the folder as the run left it") from error
    if _digest(content) != manifest.weights["digest"]:
        raise InputError(f"{path} is damaged, or of another run than the manifest: take the folder as the run left it")
    return tensors


def named(segment: Segment) -> dict[str, Tensor]:
    """A segment's weights and buffers, those too that no `state_dict` has, as in the uncut model: `BLOCK.weight`.

    Of a block that several stages run the name begins with the stage. What is tied stands there by each of its names.
    """
    tensors = {
        **dict(segment.named_parameters(remove_duplicate=False)),
        **dict(segment.named_buffers(remove_duplicate=False)),
    }
    return {_label(segment, name): tensor for name, tensor in tensors.items()}


def digest_of(segments: Iterable[Segment]) -> str:
    """Of all weights and buffers, as they are in memory."""
    content = blake2b(digest_size=8)
    for name, tensor in (item for segment in segments for item in named(segment).items()):
        content.update(name.encode())
        content.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return content.hexdigest()


def unsaved(segment: Segment) -> list[str]:
    """The names of those that no `state_dict` has."""
    kept = {_label(segment, name) for name in segment.state_dict()}
    return [name for name in named(segment) if name not in kept]


def no_tensors(segment: Segment) -> list[str]:
    """The names of what a `state_dict` has besides, as a block's `get_extra_state` gives it."""
    known = named(segment)
    return [label for name in segment.state_dict() if (label := _label(segment, name)) not in known]


def fill(segments: Iterable[Segment], tensors: Mapping[str, Tensor], where: Path) -> None:
    """Give segments these weights, in their dtype. Raises InputError, with the names, for those that do not fit."""
    own = {name: value for segment in segments for name, value in named(segment).items()}
    if told := misfits(own, tensors, "in the model"):
        raise InputError(f"{where} does not fit: {told}: give the `model` that was trained")
    for name, value in own.items():
        if value.dtype != tensors[name].dtype:
            value.data = value.data.to(tensors[name].dtype)
    put(own, tensors)


@torch.no_grad()
def put(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    """Write what is given, and fits, over one's own of its name, which keeps its dtype."""
    for name, value in given.items():
        if own[name].shape == value.shape:
            own[name].copy_(value)
        else:  # a buffer that has grown
            own[name].data = value.to(own[name].device, own[name].dtype, copy=True)


def misfits(own: Mapping[str, Tensor], given: Mapping[str, Tensor], here: str = "here") -> str:
    """Return in words the first names of what is not of one shape, or is missing in one of both; nothing if all fit."""
    told = [
        f"{name} is {_shape(given.get(name))} there and {_shape(own.get(name))} {here}"
        for name in sorted({*own, *given})
        if not _fits(own.get(name), given.get(name))
    ]
    return ", ".join(told[:FEW]) + (f", and {len(told) - FEW} more" if len(told) > FEW else "")


def _label(segment: Segment, name: str) -> str:
    block, _, rest = name.partition(".")
    return f"{segment.labels[block]}.{rest}"


def _fits(own: Tensor | None, given: Tensor | None) -> bool:
    """Buffers may have grown."""
    if own is None or given is None:
        return False
    return own.shape == given.shape or not isinstance(own, nn.Parameter)


def _shape(tensor: Tensor | None) -> object:
    return "missing" if tensor is None else list(tensor.shape)


def _digest(content: bytes) -> str:
    return blake2b(content, digest_size=16).hexdigest()
