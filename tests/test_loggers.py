"""Loggers of Lightning's own, which end with their job."""

import csv
import json
from pathlib import Path

import pytest
from pytorch_lightning.loggers import CSVLogger

from splitlearn.callbacks.summary import finishing
from splitlearn.train import train

SHORT = ("trainer.max_epochs=1", "trainer.limit_train_batches=2")


class Run:
    """Lives in the process, as one of W&B does."""

    finished = 0

    def finish(self) -> None:
        self.finished += 1


class InProcess(CSVLogger):
    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.states: list[str] = []

    def finalize(self, status: str) -> None:
        self.states.append(status)


def test_every_logger_ends_with_its_job_be_it_by_an_error(tmp_path):
    began, idle = InProcess(tmp_path), InProcess(tmp_path)
    began._experiment = run = Run()
    with finishing([began, idle]):
        pass
    assert (run.finished, began.states, idle.states, idle._experiment) == (1, ["success"], ["success"], None)
    with pytest.raises(ZeroDivisionError), finishing([began]):
        raise ZeroDivisionError
    assert (run.finished, began.states) == (2, ["success", "failed"])


def test_csv(configure, tmp_path):
    train(configure(*SHORT, "logger=csv"))
    with (tmp_path / "run" / "csv" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    (epoch,) = json.loads((tmp_path / "run" / "results.json").read_text())["epochs"]
    assert [float(row["train/loss"]) for row in rows if row["train/loss"]] == [pytest.approx(epoch["train/loss"])]


def test_wandb_offline(configure, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for job in ("first", "second"):
        train(configure(*SHORT, "logger=wandb", f"output_dir={tmp_path}/{job}"))
        assert wandb.run is None
        assert len(list((tmp_path / job / "wandb").glob("offline-run-*/*.wandb"))) == 1


def test_mlflow_in_a_local_folder(configure, tmp_path):
    mlflow = pytest.importorskip("mlflow")
    for job in ("first", "second"):
        train(configure(*SHORT, "logger=mlflow", f"output_dir={tmp_path}/{job}"))
        client = mlflow.tracking.MlflowClient(f"sqlite:///{tmp_path}/{job}/mlflow.db")
        experiment = client.get_experiment_by_name("splitlearn")
        (run,) = client.search_runs([experiment.experiment_id])
        assert run.info.status == "FINISHED"
        assert run.data.metrics["test/accuracy"] >= 0
