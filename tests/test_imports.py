"""The layers of the package: a wing imports only from the spine's files and the wings that stand before it."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import splitlearn

SRC = Path(splitlearn.__file__).parent
# A layer in each line; what stands in one line may import from one another.
LAYERS = [
    ("errors", "seeds", "certificates"),
    ("layout", "models"),
    ("blocks", "segment", "ledger", "wire", "cut", "network"),  # the spine
    ("saved", "costs"),
    ("schedules",),
    ("training",),
    ("data",),
    ("learner",),
    ("callbacks", "build"),
    ("federation",),
    ("train", "advise", "predict", "export"),  # what one runs
]
SEE_HYDRA = (
    "build",
    "callbacks.run_folder",
    "callbacks.summary",
    "callbacks.sweep_table",
    "federation.launch",
    "train",
    "advise",
    "predict",
    "export",
)
NO_LIGHTNING = (
    "errors",
    "layout",
    "models",
    "ledger",
    "segment",
    "wire",
    "cut",
    "network",
    "saved",
    "costs",
    "schedules",
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


def layer_of(module: str) -> int:
    (layer,) = [i for i, names in enumerate(LAYERS) if module.split(".")[0] in names]
    return layer


def below(module: str, places: tuple[str, ...]) -> bool:
    return any(f"{module}.".startswith(f"{place}.") for place in places)


def importing(package: str) -> list[str]:
    names = [name for name, path in FILES.items() if any(below(each, (package,)) for each in imports(path))]
    assert names, f"nothing imports {package}"
    return names


@pytest.mark.parametrize("name", FILES)
def test_a_file_imports_only_from_its_layer_and_those_before(name):
    own = [i.removeprefix("splitlearn.") for i in imports(FILES[name]) if i.startswith("splitlearn.")]
    assert [i for i in own if layer_of(i) > layer_of(name)] == []


def test_the_top_is_seen_at_a_glance():
    assert len([name for name in FILES if "." not in name and FILES[name].name != "__init__.py"]) <= 16


@pytest.mark.parametrize("package", ["hydra", "omegaconf"])
def test_only_entry_points_see_configurations(package):
    assert [name for name in importing(package) if not below(name, SEE_HYDRA)] == []


def test_lightning_stays_out_of_the_spine():
    assert [name for name in importing("pytorch_lightning") if below(name, NO_LIGHTNING)] == []


def test_torch_distributed_is_only_where_processes_are():
    named = [name for name, path in FILES.items() if "torch.distributed" in path.read_text()]
    assert [name for name in named if not below(name, ("federation",))] == []
