"""The layers of the package: a file imports only from those before its own."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import splitlearn

SRC = Path(splitlearn.__file__).parent
LAYERS = [
    *("seeds", "errors", "csv_file", "layout", "ledger", "link", "frame", "certificates", "sealing"),
    *("models.layers", "models.lenet", "models.mlp", "models.resnet", "models.vgg", "models.zoo", "models"),
    *("wire", "cut", "blocks", "segment", "network", "flops", "leakage", "cuts"),
    *("averaging", "live", "partition", "sharing", "means", "schedule", "rounds", "tally", "checks", "timeline"),
    *("pace", "data.augment", "data.sources", "data.table", "data.own", "data.rows"),
    *("data.alike", "data.holdout", "data.loader", "data.module", "data"),
    *("optimizers", "learner", "prediction"),
    *("drawing", "picture", "accuracy", "watch", "callbacks", "judging"),
    *("probe", "star", "hub", "transports", "remote"),
    *("engines", "engines.simulated", "engines.snapshots", "engines.together", "engines.wiring"),
    *("engines.forms", "engines.greetings", "engines.federation", "engines.processes"),
    *("build", "report", "sweep", "federate", "train", "advise"),
]
LIGHTNING = (
    *("checks", "pace", "data", "optimizers", "learner", "prediction", "watch", "callbacks", "judging"),
    *("attacks", "engines", "build", "report", "federate", "train"),
)


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(SRC).with_suffix("").parts).removesuffix(".__init__")


FILES = {module_of(path): path for path in sorted(SRC.rglob("*.py")) if path != SRC / "__init__.py"}


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, wherever in it; `from a import b` is `a.b` where that is a file, else `a`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full.removeprefix("splitlearn.") in FILES else str(node.module)


def outside(prefix: str, allowed: tuple[str, ...]) -> list[str]:
    """The files that import `prefix` or what is below it, but are not among `allowed`."""
    importing = [name for name, path in FILES.items() if any(f"{i}.".startswith(f"{prefix}.") for i in imports(path))]
    assert importing, f"nothing imports {prefix}"
    return [name for name in importing if not any(f"{name}.".startswith(f"{layer}.") for layer in allowed)]


def test_every_file_has_its_layer():
    assert sorted(LAYERS) == sorted(FILES)


@pytest.mark.parametrize("name", FILES)
def test_a_file_imports_only_from_the_layers_before_its_own(name):
    own = [i.removeprefix("splitlearn.") for i in imports(FILES[name]) if i.startswith("splitlearn.")]
    assert [i for i in own if LAYERS.index(i) >= LAYERS.index(name)] == []


@pytest.mark.parametrize("package", ["hydra", "omegaconf"])
def test_only_entry_points_see_configurations(package):
    assert outside(package, ("build", "report", "sweep", "federate", "train", "advise")) == []


def test_lightning_stays_out_of_the_crossing():
    assert outside("pytorch_lightning", LIGHTNING) == []


def test_torch_distributed_is_only_where_processes_are():
    named = [name for name, path in FILES.items() if "torch.distributed" in path.read_text()]
    assert set(named) <= {"transports", "engines.wiring"}
