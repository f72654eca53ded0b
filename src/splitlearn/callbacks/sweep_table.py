"""The table at the end of a sweep: one line for each run, what was asked of it and what it came to."""

from __future__ import annotations

import atexit
import csv
import json
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

NUMBERS = ("test/accuracy", "test/loss", "epochs", "bytes", "seconds")


class SweepTable(Callback):
    """Prints the runs of a multirun side by side, and keeps them as `sweep.csv` in its folder.

    A run without a test result is listed with what stopped it, or as `no result`; one of an earlier sweep into the same
    folder is left out.
    """

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        # Where a run has failed, Hydra raises its error at the end of the sweep and never comes to on_multirun_end.
        self.folder = Path(config.hydra.sweep.dir)
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "sweep.csv").write_text("")  # of this sweep from now on
        self.began = (self.folder / "sweep.csv").stat().st_mtime_ns
        atexit.register(self.show)

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        atexit.unregister(self.show)
        self.show()

    def show(self) -> None:
        folder = self.folder
        asked = [path for path in folder.glob("**/.hydra/overrides.yaml") if path.stat().st_mtime_ns >= self.began]
        runs = [_read(path.parents[1]) for path in sorted(asked, key=_number)]
        if not runs:
            return
        keys = dict.fromkeys(key for run in runs for key in run if key not in (*NUMBERS, "stopped"))
        varied = [key for key in keys if len({run.get(key) for run in runs}) > 1]
        stopped = ["stopped"] * any("stopped" in run for run in runs)
        columns = [*varied, *NUMBERS, *stopped]
        table = Table(*columns, title=str(folder))
        for run in runs:
            table.add_row(*(_shown(key, run.get(key, "")) for key in columns))
        Console().print(table)
        with (folder / "sweep.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, columns, restval="", extrasaction="ignore")
            writer.writeheader()
            writer.writerows(runs)


def _number(path: Path) -> tuple[int, str]:
    name = path.parents[1].name
    return (int(name) if name.isdecimal() else 0, str(path))


def _read(folder: Path) -> dict[str, Any]:
    """What was asked of a run by its overrides, and its results."""
    overrides = [
        str(override).lstrip("+~").partition("=") for override in OmegaConf.load(folder / ".hydra" / "overrides.yaml")
    ]
    run: dict[str, Any] = {key: value for key, _, value in overrides}
    path = folder / "results.json"
    results: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {"stopped": "no result"}
    run.update({key: value for key, value in results.get("test", {}).items() if key in NUMBERS})
    if "bytes" in results:
        run["epochs"] = len(results["epochs"])
        run["bytes"] = sum(sum(kinds.values()) for kinds in results["bytes"].values())
        run["seconds"] = results["seconds"]
    if "stopped" in results:
        run["stopped"] = results["stopped"]
    return run


def _shown(key: str, value: Any) -> str:
    if key == "stopped":  # the kind of error; the CSV has all of it
        return value.partition(":")[0]
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}" if isinstance(value, float) else str(value)
