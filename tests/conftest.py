"""Shared by all: configurations as the command line makes them, and small data sets on disk."""

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from PIL import Image
from torch.utils.data import TensorDataset

from splitlearn.data import Source
from splitlearn.train import CONF

Configure = Callable[..., DictConfig]

torch.set_num_threads(1)  # on nets this small a second thread costs more than it does


@pytest.fixture(autouse=True)
def _no_data_of_ones_own(monkeypatch):
    monkeypatch.delenv("SPLITLEARN_DATA", raising=False)


@pytest.fixture
def configure(tmp_path) -> Configure:
    """Compose a run's configuration from overrides as they are typed. It runs into `tmp_path`/run, on the CPU."""

    def configure(*overrides: str) -> DictConfig:
        fixed = (f"output_dir={tmp_path}/run", "trainer.accelerator=cpu", "trainer.enable_progress_bar=false")
        with initialize_config_dir(CONF, version_base="1.3"):
            return compose("train", [*fixed, *overrides])

    return configure


@pytest.fixture(scope="session")
def idx_root(tmp_path_factory) -> Path:
    """MNIST and Fashion-MNIST of 200 training and 50 test images."""
    root, rng = tmp_path_factory.mktemp("idx"), np.random.default_rng(0)
    for name in ("MNIST", "FashionMNIST"):
        folder = root / name / "raw"
        folder.mkdir(parents=True)
        for part, n in (("train", 200), ("t10k", 50)):
            images = rng.integers(256, size=(n, 28, 28), dtype=np.uint8)
            (folder / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">4I", 2051, n, 28, 28) + images.tobytes())
            labels = np.arange(n, dtype=np.uint8) % 10
            (folder / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">2I", 2049, n) + labels.tobytes())
    return root


@pytest.fixture(scope="session")
def picture_root(tmp_path_factory) -> Path:
    """Pictures of 8x6 pixels in the class folders cat and dog, ten in each."""
    root, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for name in ("cat", "dog"):
        (root / name).mkdir()
        for i in range(10):
            Image.fromarray(rng.integers(256, size=(6, 8, 3), dtype=np.uint8)).save(root / name / f"{i}.png")
    return root


@pytest.fixture
def few_cifar(monkeypatch) -> None:
    """CIFAR-10 and CIFAR-100 of 30 training and 10 test images, in place of the downloads."""
    for name, num_classes in (("cifar10", 10), ("cifar100", 100)):

        def source(root, download, num_classes=num_classes) -> Source:
            generator = torch.Generator().manual_seed(0)
            x = torch.randint(256, (40, 3, 32, 32), dtype=torch.uint8, generator=generator)
            y = torch.arange(40) % num_classes
            return Source(TensorDataset(x[:30], y[:30]), TensorDataset(x[30:], y[30:]), num_classes)

        monkeypatch.setattr(f"splitlearn.data.sources.{name}", source)
