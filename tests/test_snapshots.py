"""Snapshots of one process: when they are taken, which are kept, and what is left of an unfinished attempt."""

import os

import torch
from pytorch_lightning.callbacks import Callback
from runs import difference, end_state, make_data, make_learner, make_trainer

from splitlearn.federation.snapshots import Snapshots, common_in, name_of, steps_in
from splitlearn.training.checkpoints import SafeCheckpointIO

RUN, OTHER = "0" * 32, "1" * 32


class Looks(Callback):
    """Keeps the steps of which there are snapshots, behind every mini-batch."""

    def __init__(self, folder) -> None:
        self.folder, self.seen = folder, []

    def on_train_batch_end(self, *_) -> None:
        self.seen.append(steps_in([self.folder]).get(RUN, []))


def run(folder, every, told, ckpt=None, max_epochs=2, saving=()):
    """Ten mini-batches an epoch."""
    data = make_data(val_rows=6)
    learner, looks = make_learner(data), Looks(folder)
    trainer = make_trainer(folder, [looks, *saving, Snapshots(folder, every, RUN, told.append)], max_epochs=max_epochs)
    trainer.fit(learner, datamodule=data, ckpt_path=ckpt)
    return looks.seen, end_state(learner, trainer)


def test_the_last_two_are_kept_and_the_end_is_one(tmp_path):
    told = []
    seen, _ = run(tmp_path, 6, told)
    assert told == [6, 12, 18, 20]
    assert steps_in([tmp_path]) == {RUN: [18, 20]}
    assert seen == 6 * [[]] + 6 * [[6]] + 6 * [[6, 12]] + 2 * [[12, 18]]
    assert common_in([tmp_path]) == [RUN]


def test_the_end_is_saved_once(tmp_path):
    told = []
    run(tmp_path, 5, told)
    assert told == [5, 10, 15, 20]


def test_a_run_goes_on_from_its_end_with_more_epochs(tmp_path):
    _, whole = run(tmp_path / "whole", 7, [])
    run(tmp_path / "first", 7, [], max_epochs=1)
    _, more = run(tmp_path / "more", 7, [], tmp_path / "first" / name_of(RUN, 10))
    assert difference(more, whole) == []


def test_what_an_unfinished_attempt_left_is_removed_at_once_and_other_runs_stay(tmp_path):
    run(tmp_path, 4, [], max_epochs=1)
    assert steps_in([tmp_path]) == {RUN: [8, 10]}
    (tmp_path / name_of(OTHER, 9)).touch()
    seen, _ = run(tmp_path, 40, [], tmp_path / name_of(RUN, 8))
    assert seen[0] == [8]
    assert steps_in([tmp_path]) == {OTHER: [9], RUN: [8, 20]}


def test_a_snapshot_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    synced, sync = [], os.fsync

    def noted(descriptor) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        assert os.path.exists(tmp_path / "x.ckpt") == (synced[-1] == str(tmp_path))
        sync(descriptor)

    monkeypatch.setattr("os.fsync", noted)
    SafeCheckpointIO().save_checkpoint({"weights": torch.zeros(3)}, tmp_path / "x.ckpt")
    assert synced == [str(tmp_path / "x.ckpt.tmp"), str(tmp_path)]
