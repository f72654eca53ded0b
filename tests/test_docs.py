"""Every command and every Python example of the README and of docs/ runs, on few rows."""

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from torchvision.utils import save_image

from splitlearn.train import CONF, train

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
FEW = ("trainer.max_epochs=1", "trainer.limit_train_batches=2", "trainer.limit_val_batches=1")
QUIET = ("trainer.enable_progress_bar=false", "trainer.accelerator=cpu", "~callbacks.interrupt")
TOY = {"PARTY": "alice0", "HOST": "127.0.0.1", "data=cifar10": "data=digits"}


def blocks(language: str) -> Iterator[tuple[Path, str]]:
    for page in PAGES:
        yield from ((page, text) for kind, text in BLOCK.findall(page.read_text()) if kind == language)


def commands() -> Iterator[tuple[str, list[str]]]:
    """Each `python -m splitlearn.train ...` with its shell variables put in: where it stands, and what it asks for."""
    for page, text in blocks("bash"):
        variables: dict[str, str] = {}
        for line in text.replace("\\\n", " ").splitlines():
            for name, value in variables.items():
                line = line.replace(f"${name}", value)
            words = shlex.split(line, comments=True)
            if len(words) == 1 and re.match(r"[A-Z]+=", words[0]):
                variables.update([words[0].split("=", 1)])
            for start in (i for i, word in enumerate(words) if word == "splitlearn.train"):
                yield page.name, words[start + 1 :]


COMMANDS = list(commands())


def first_of_sweep(override: str) -> str:
    """`layout.cut=1,2,3` asks for three runs: the first."""
    parsed = OverridesParser.create().parse_override(override)
    if not parsed.is_sweep_override() or parsed.get_key_element() == "hydra":
        return override
    if "glob" in override:
        return override.split("=")[0] + "=sequential"
    key, values = override.split("=", 1)
    return f"{key}={values.split(',')[0]}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the commands expect to find where they are started."""
    here = tmp_path_factory.mktemp("user")
    rows = [f"{40 + i},{60 + i % 7},{120 + i % 11},{('ill', 'well')[i % 2]}" for i in range(60)]
    (here / "patients.csv").write_text("\n".join(["age,weight,pressure,diagnosis", *rows]))
    for split in ("cat", "dog"):
        (here / "my_pictures" / split).mkdir(parents=True)
        for i in range(20):
            save_image(torch.rand(3, 40, 36), here / "my_pictures" / split / f"{i}.png")
    model = next(text for _, text in blocks("python") if "def my_net" in text)
    data = (
        "class MyDataset(torch.utils.data.Dataset):\n"
        "    def __len__(self): return 60\n"
        "    def __getitem__(self, i): return torch.rand(1, 8, 8), i % 3\n"
    )
    (here / "my_module.py").write_text(f"import torch\n{model}\n{data}")
    with initialize_config_dir(CONF, version_base="1.3"):
        train(compose("train", ["+experiment=digits_2party", *FEW, *QUIET, f"output_dir={here}/my_run"]))
    return here


@pytest.mark.parametrize(("page", "words"), COMMANDS, ids=[" ".join(words)[:70] for _, words in COMMANDS])
def test_a_command_runs(page, words, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    asked = [word for word in words if word != "-m" and not word.startswith(("hydra", "ckpt="))]
    for name, toy in TOY.items():
        asked = [word.replace(name, toy) for word in asked]
    elsewhere = any(word.startswith(("engine.party", "engine=processes")) for word in asked)
    asked = [first_of_sweep(word) for word in asked]
    with initialize_config_dir(CONF, version_base="1.3"):
        cfg = compose("train", [*asked, *FEW, *QUIET, f"output_dir={tmp_path}"])
    if not elsewhere:  # tests/federation runs those of several processes
        train(cfg)
        assert (tmp_path / "results.json").is_file()


def test_the_example_without_hydra_runs(tmp_path):
    page, code = next((page, text) for page, text in blocks("python") if "trainer.fit(" in text)
    assert page.name == "README.md"
    (tmp_path / "example.py").write_text(code)
    done = subprocess.run([sys.executable, "example.py"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "activation" in done.stdout


def test_the_heart_is_the_code_that_runs():
    """The README's first Python blocks stand in the source, line by line."""
    source = "".join((ROOT / "src" / "splitlearn" / name).read_text() for name in ("learner.py", "cut.py"))
    for _, text in list(blocks("python"))[:2]:
        for line in text.splitlines():
            assert line.strip().split("  #")[0] in source
