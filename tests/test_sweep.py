"""The table at the end of a sweep is what its runs have left in their folders."""

import csv
import json

import pytest
from commands import run_command
from omegaconf import OmegaConf

from splitlearn.callbacks.sweep_table import SweepTable

DONE = {"epochs": [{}, {}], "test": {"test/loss": 0.5, "test/accuracy": 0.75}, "bytes": {"a->b": {"x": 7, "y": 5}}}


def leave(folder, number, overrides, results):
    (folder / str(number) / ".hydra").mkdir(parents=True)
    (folder / str(number) / ".hydra" / "overrides.yaml").write_text(json.dumps(overrides))
    if results is not None:
        (folder / str(number) / "results.json").write_text(json.dumps({**results, "seconds": 1.5}))


@pytest.fixture
def sweep(tmp_path):
    """Where a sweep was, of which a run is left."""
    leave(tmp_path, 77, ["optimizer.lr=77"], DONE)
    (tmp_path / "sweep.csv").write_text("of the earlier one")
    return tmp_path


def run(folder):
    """Twelve runs, so that numbers must be sorted as such; one stopped, one left nothing."""
    for number in range(12):
        stopped = {"epochs": [], "test": {}, "bytes": {}, "stopped": "DivergedError: the loss is nan"}
        results = {3: stopped, 4: None}.get(number, DONE)
        leave(folder, number, ["+experiment=e", f"optimizer.lr={number}"], results)


def test_a_line_for_each_run_of_this_sweep_in_order_and_a_column_for_each_key_that_varies(sweep, capsys):
    table = SweepTable()
    config = OmegaConf.create({"hydra": {"sweep": {"dir": str(sweep)}}})
    table.on_multirun_start(config)
    run(sweep)
    table.on_multirun_end(config)
    with (sweep / "sweep.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["optimizer.lr"] for line in lines] == [str(i) for i in range(12)]
    names = ["optimizer.lr", "test/accuracy", "test/loss", "epochs", "bytes", "seconds", "stopped"]
    assert list(lines[0]) == names
    assert list(lines[0].values()) == ["0", "0.75", "0.5", "2", "12", "1.5", ""]
    assert list(lines[3].values()) == ["3", "", "", "0", "0", "1.5", "DivergedError: the loss is nan"]
    assert list(lines[4].values()) == ["4", "", "", "", "", "", "no result"]
    printed = capsys.readouterr().out
    assert "Diverged" in printed
    assert "nan" not in printed


def test_a_sweep_with_a_failed_run_ends_with_the_table_too(tmp_path):
    quiet = ["trainer.fast_dev_run=true", f"hydra.sweep.dir={tmp_path}", "trainer.enable_progress_bar=false"]
    done = run_command("-m", "schedule=fedavg", "num_alices=0,2", *quiet, cwd=tmp_path)
    assert done.returncode == 1
    assert "`num_alices` (=0)" in done.stderr
    with (tmp_path / "sweep.csv").open() as file:
        first, second = csv.DictReader(file)
    assert (first["num_alices"], first["stopped"], second["num_alices"]) == ("0", "no result", "2")
    assert 0 <= float(second["test/accuracy"]) <= 1
    assert "no result" in done.stdout
