"""A module as a file that runs without its code, of `torch.export` or ONNX; what is written is read and compared."""

from __future__ import annotations

import logging
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib.metadata import version
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from splitlearn.errors import InputError, outside, told_if_full
from splitlearn.network import join

TRACED = 2  # rows; the checks have another number of them
SEED = 0  # of the random rows
NEEDED = ("onnx", "onnxscript", "onnxruntime")
# What two programs of one network may differ by, as a part of the value and of the largest of all values.
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
Run = Callable[[Sequence[Tensor]], Tensor]


class Format(NamedTuple):
    """A kind of file: how a program is written, with the names of its inputs and its output, and how it is run."""

    name: str
    suffix: str
    write: Callable[[ExportedProgram, Sequence[str], str, Path], None]
    read: Callable[[Path], Run]
    packages: tuple[str, ...]


class Joined(nn.Sequential):
    """Blocks one behind the other. It takes one value [B, ...], or several, which are joined along dimension 1."""

    def __init__(self, blocks: Mapping[str, Any]) -> None:
        super().__init__(OrderedDict(blocks))

    def forward(self, *inputs: Tensor) -> Tensor:
        return super().forward(join(list(inputs)))


class Difference(NamedTuple):
    """Of two outputs: the largest of all values, and what is allowed: `atol` and `rtol` times the expected value."""

    largest: float
    rtol: float
    atol: float


def write_program(
    module: Joined, inputs: Mapping[str, Tensor], output: str, formats: Sequence[Format], stem: Path
) -> Iterator[tuple[Path, Format, Difference]]:
    """Write `stem` with the suffix of each format; yield each file when it is read again and runs as the module does.

    Any number of rows goes in: what is traced with two rows is compared on all of `inputs`, and on the first row alone.

    Arguments:
        module: in evaluation mode.
        inputs: rows [N, ...] by the names that they have in the file.
        output: the name of the output.

    Raises InputError, and leaves no file, where a block has no such program, which is named, or where outputs differ.
    """
    rows = list(inputs.values())
    program = _traced(module, rows)
    for each in formats:
        with told_if_full(stem.parent, "run"):
            stem.parent.mkdir(parents=True, exist_ok=True)
            with TemporaryDirectory(dir=stem.parent, prefix=".") as scratch:
                path = Path(scratch) / f"{stem.name}{each.suffix}"
                run = _written(program, list(inputs), output, each, path, module, rows)
                difference = _compare_all(run, module, rows, f"{stem}{each.suffix}")
                for file in Path(scratch).iterdir():  # ONNX of more than 2 GB has its weights beside it
                    file.replace(stem.parent / file.name)
        yield stem.parent / path.name, each, difference


def random_rows(num: int, shape: Sequence[int], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Return rows [num, *shape]: normal ones, or zeros and ones where the values are whole numbers."""
    if dtype.is_floating_point:
        return torch.randn(num, *shape, generator=generator).to(dtype)
    return torch.randint(2, (num, *shape), generator=generator).to(dtype)  # which any embedding takes


def require(formats: Sequence[Format]) -> None:
    """Raises InputError where a format needs what is not installed."""
    missing = [name for each in formats for name in each.packages if find_spec(name) is None]
    if missing:
        raise InputError(
            f"ONNX needs {', '.join(missing)}, not installed here: pip install 'splitlearn[export]', or take "
            "format=torch"
        )


def versions(each: Format) -> dict[str, str]:
    return {name: version(name) for name in ("splitlearn", "torch", *each.packages)}


def _traced(module: Joined, rows: Sequence[Tensor]) -> ExportedProgram:
    try:
        return _trace(module, rows)
    except Exception as error:  # it runs the blocks' own code, which may raise anything
        name, reason = _blame(module, rows, error, _trace)
        raise InputError(
            f"{name} cannot be exported ({reason}): its forward must do the same whatever the values, and for any "
            "number of rows"
        ) from error


def _trace(module: Joined, rows: Sequence[Tensor]) -> ExportedProgram:
    some, sizes = tuple(torch.cat([x[:1]] * TRACED) for x in rows), {0: Dim("rows")}
    with _quiet():
        return torch.export.export(module, some, dynamic_shapes=((sizes,) * len(some),), strict=False)


def _written(
    program: ExportedProgram,
    names: Sequence[str],
    output: str,
    each: Format,
    path: Path,
    module: Joined,
    rows: Sequence[Tensor],
) -> Run:
    def attempt(program: ExportedProgram, rows: Sequence[Tensor], path: Path, names: Sequence[str]) -> Run:
        with _quiet():
            each.write(program, names, output, path)
            run = each.read(path)
            run(rows)
        return run

    def alone(block: Joined, rows: Sequence[Tensor]) -> Run:
        return attempt(_trace(block, rows), rows, path.with_name(f"block{each.suffix}"), ["x"])

    try:
        return attempt(program, rows, path, names)
    except OSError:
        raise
    except Exception as error:
        name, reason = _blame(module, rows, error, alone)
        other = "" if each.name == "torch" else ": take format=torch"
        raise InputError(f"{name} cannot be written as {each.name.upper()} ({reason}){other}") from error


def _blame(
    module: Joined, rows: Sequence[Tensor], error: Exception, attempt: Callable[[Joined, Sequence[Tensor]], object]
) -> tuple[str, str]:
    """Return the first block that fails by itself too, and why; the network, where each of them works alone."""
    x = join(list(rows))
    for name, block in module._modules.items():
        try:
            attempt(Joined({name: block}), [x])
        except Exception as own:
            return f"block `{name}`", _reason(own)
        with torch.no_grad():
            x = block(x)
    return "the network", _reason(error)


def _reason(error: BaseException) -> str:
    """The first line of what is behind it all."""
    while error.__cause__ is not None:
        error = error.__cause__
    return outside((str(error).strip() or type(error).__name__).splitlines()[0], 200)


def _compare_all(run: Run, module: Joined, rows: Sequence[Tensor], file: str) -> Difference:
    found = []
    for some in (rows, [x[:1] for x in rows]):
        with torch.no_grad():
            expected, given = module(*some), run(some)
        found.append(compare(expected, given, file))
    return max(found)


def compare(expected: Tensor, given: Tensor, what: str) -> Difference:
    """Raises InputError where `given` is another output than `expected`, by more than is allowed for its dtype."""
    told = f"{what} is wrong, and not kept"
    if (given.shape, given.dtype) != (expected.shape, expected.dtype):
        raise InputError(
            f"{told}: it gives {list(given.shape)} of {given.dtype} for {list(expected.shape)} of {expected.dtype}"
        )
    finite = expected.isfinite()
    if not finite.any():
        raise InputError(f"{told}: of random rows the network makes nothing finite, which proves nothing")
    rtol = TOLERANCES.get(expected.dtype, 0.0)
    atol = rtol * float(expected[finite].abs().max())
    apart = (given.double() - expected.double())[finite].abs()
    largest = float(apart.max())
    if not torch.isclose(given, expected, rtol=rtol, atol=atol, equal_nan=True).all():
        raise InputError(
            f"{told}: its output differs from torch's by {largest:.3g}, where rtol={rtol:g} and atol={atol:.3g} are "
            "allowed: take another format"
        )
    return Difference(largest, rtol, atol)


@contextmanager
def _quiet() -> Iterator[None]:
    """What torch logs of its own work, and prints of a graph that fails, is not for the user: an error tells it."""
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with redirect_stderr(StringIO()), redirect_stdout(StringIO()):
                yield
    finally:
        logging.disable(logging.NOTSET)


def _save(program: ExportedProgram, names: Sequence[str], output: str, path: Path) -> None:
    torch.export.save(program, path)


def _load(path: Path) -> Run:
    module: Any = torch.export.load(path).module()
    return lambda rows: module(*rows)


def _save_onnx(program: ExportedProgram, names: Sequence[str], output: str, path: Path) -> None:
    sizes = ({0: Dim("rows")},) * len(names)
    named: dict[str, Any] = {"input_names": list(names), "output_names": [output], "dynamic_shapes": sizes}
    made = torch.onnx.export(program, dynamo=True, verbose=False, **named)
    made.save(path)  # type: ignore[union-attr]


def _load_onnx(path: Path) -> Run:
    from onnxruntime import InferenceSession  # no dependency of ours

    session = InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]

    def run(rows: Sequence[Tensor]) -> Tensor:
        (output,) = session.run(None, {name: x.numpy() for name, x in zip(names, rows, strict=True)})
        return torch.from_numpy(output)

    return run


FORMATS = {
    "torch": Format("torch", ".pt2", _save, _load, ()),
    "onnx": Format("onnx", ".onnx", _save_onnx, _load_onnx, NEEDED),
}
