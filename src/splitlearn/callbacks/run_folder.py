"""The folder of a run: seen to before Hydra makes it."""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from splitlearn.errors import InputError, told_if_full

FEW = 4096  # bytes, which a full disk does not take; an empty file it may


class RunFolder(Callback):
    """Ends a run, or a multirun, in one line where its folder cannot be made or written: Hydra has a stack trace."""

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        _require(config.hydra.run.dir, "hydra.run.dir")

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        _require(config.hydra.sweep.dir, "hydra.sweep.dir")


def _require(folder: str, key: str) -> None:
    try:
        with told_if_full(folder, key):
            Path(folder).mkdir(parents=True, exist_ok=True)
            with TemporaryFile(dir=folder) as file:
                file.write(bytes(FEW))
    except InputError as error:
        sys.exit(f"splitlearn: {error}")  # any other error of a callback Hydra only warns of
