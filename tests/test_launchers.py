"""Hydra's parallel launchers: a sweep in several processes leaves and returns what the serial one does."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hydra import initialize_config_dir
from hydra._internal.callbacks import Callbacks
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.types import HydraContext, RunMode
from submitit.core.utils import FailedJobError

from splitlearn.errors import DivergedError
from splitlearn.train import CONF, main

FEW = ("trainer.max_epochs=1", "trainer.limit_train_batches=3", "trainer.accelerator=cpu")
QUIET = ("logger=none", "trainer.enable_progress_bar=false")
JOBS = [["+experiment=digits_2party", *FEW, *QUIET, f"optimizer.lr={lr}"] for lr in ("1e30", "0.1")]
LAUNCHERS = {
    "joblib": ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"],
    "submitit_local": ["hydra/launcher=submitit_local"],
}
SLURM = {
    "hydra.launcher.partition=gpu": "#SBATCH --partition=gpu",
    "hydra.launcher.gpus_per_node=1": "#SBATCH --gpus-per-node=1",
    "hydra.launcher.cpus_per_task=4": "#SBATCH --cpus-per-task=4",
    "hydra.launcher.mem_gb=16": "#SBATCH --mem=16GB",
    "hydra.launcher.timeout_min=720": "#SBATCH --time=720",
    "hydra.launcher.array_parallelism=1": "#SBATCH --array=0-1%1",  # of two jobs one at a time
    "hydra.launcher.account=lab": "#SBATCH --account=lab",
    "hydra.launcher.setup=[module load cuda]": "module load cuda",
    "+hydra.launcher.additional_parameters.mail-type=END": "#SBATCH --mail-type=END",
}


def sweep(folder: Path, *overrides: str, jobs: list[list[str]] = JOBS) -> list[JobReturn]:
    """What a sweeper gets for two jobs, of which the first of `JOBS` diverges; they run into `folder`/0 and /1."""
    with initialize_config_dir(CONF, version_base="1.3", job_name="train"):
        hydra = GlobalHydra.instance().hydra
        hydras = ("hydra/job_logging=none", "hydra/hydra_logging=none", "hydra.mode=MULTIRUN")
        cfg = hydra.compose_config("train", [*hydras, f"hydra.sweep.dir={folder}", *overrides], RunMode.MULTIRUN)
        context = HydraContext(config_loader=hydra.config_loader, callbacks=Callbacks(cfg))
        task = main.__wrapped__  # what @hydra.main hands to a sweeper
        launcher = Plugins.instance().instantiate_launcher(hydra_context=context, task_function=task, config=cfg)
        return launcher.launch(jobs, initial_job_idx=0)


def timeless(part: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in part.items() if name != "seconds"}


def left(folder: Path) -> dict[str, Any]:
    """The files and the results of each run, without its seconds: no two runs take the same."""
    found: dict[str, Any] = {}
    for run in (folder / "0", folder / "1"):
        found[run.name] = sorted(str(path.relative_to(run)) for path in run.rglob("*") if path.is_file())
        found[run.name, "results"] = json.loads((run / "results.json").read_text(), object_hook=timeless)
    return found


@pytest.fixture(scope="module")
def serial(tmp_path_factory) -> tuple[list[JobReturn], dict[str, Any]]:
    folder = tmp_path_factory.mktemp("serial")
    return sweep(folder), left(folder)


@pytest.mark.slow
@pytest.mark.parametrize("overrides", LAUNCHERS.values(), ids=LAUNCHERS)
def test_a_parallel_sweep_is_the_serial_one_and_a_failed_job_leaves_the_other(overrides, serial, monkeypatch, tmp_path):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as in this process: more may add in another order
    (diverged, trained), expected = serial
    failed, returned = sweep(tmp_path, *overrides)
    assert left(tmp_path) == expected
    assert returned.return_value == trained.return_value
    assert returned.working_dir == trained.working_dir  # a relative data.root is found there
    with pytest.raises(DivergedError) as error:
        failed.return_value  # noqa: B018
    assert str(error.value) == str(diverged._return_value)


@pytest.mark.slow
def test_jobs_of_joblib_read_their_rows_with_workers_of_their_own(monkeypatch, tmp_path):
    # A job is a process of loky already, and starts two more. One process of ours that reads by itself is the measure.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    few = ("data.batch_size=4", "trainer.limit_train_batches=2", "trainer.limit_val_batches=0", "metric=test/accuracy")
    settings = (*few, "data.in_memory=false", "~callbacks.tensorboard")
    jobs = [["+experiment=digits_2party", *FEW, *QUIET, *settings, f"seed={seed}"] for seed in (0, 1)]
    alone = sweep(tmp_path / "alone", jobs=jobs)
    together = sweep(tmp_path / "together", *LAUNCHERS["joblib"], jobs=[[*job, "data.num_workers=2"] for job in jobs])
    assert left(tmp_path / "together") == left(tmp_path / "alone")
    assert [job.return_value for job in together] == [job.return_value for job in alone]


def test_slurm_is_asked_for_what_the_command_line_says(monkeypatch, tmp_path):
    # This cluster notes what it is asked for, and refuses: nothing waits for it.
    for name, script in {"srun": "", "sbatch": f'cp "$1" {tmp_path}/asked; exit 1'}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(FailedJobError):
        sweep(tmp_path, "hydra/launcher=submitit_slurm", *SLURM)
    asked = (tmp_path / "asked").read_text().splitlines()
    assert set(SLURM.values()) <= set(asked)
