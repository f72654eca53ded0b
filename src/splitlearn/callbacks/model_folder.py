"""What a run leaves of its network: a model folder for each party."""

from __future__ import annotations

import math
import platform
from collections.abc import Iterator, Mapping
from dataclasses import replace
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from splitlearn.layout import Role
from splitlearn.learner import SplitLearner
from splitlearn.network import join
from splitlearn.saved.folder import WEIGHTS, named, no_tensors, share_weights, unsaved, write_weights, write_whole
from splitlearn.saved.loading import FOLDER
from splitlearn.saved.manifest import MANIFEST, Manifest, shape_and_dtype
from splitlearn.schedules.final import FINAL, Left, Moment, hand_out
from splitlearn.schedules.sharing import check_choice
from splitlearn.segment import Segment
from splitlearn.training.checkpoints import SafeCheckpointIO, best_of, moment_of, monitoring
from splitlearn.training.finite import check_finite

MEASURED = ("val/", "test/")
OUTPUTS: dict[type[nn.Module], str] = {nn.CrossEntropyLoss: "logits", nn.NLLLoss: "log-probabilities"}


class ModelFolder(Callback):
    """When training has ended, writes `FOLDER/PARTY/model` for each party: weights, and a manifest that explains them.

    The weights are those of the best checkpoint, where a ModelCheckpoint has a monitor, else the last; the test adds
    its metrics if it tests the same ones. With one process per party `folder` is the party's own.

    Arguments:
        folder: of the run.
        final: where the Alices hand on or average their weights, `all` are given the trained ones at the end, counted
            in the learner's `final_ledger`; with `last` those who are behind get a manifest alone, which says who has
            them.
        model: how the model was asked for, `{"_target_": ...}`, and config: a digest of the configuration that all
            share; where there is a configuration, `splitlearn.build` sets both.
    """

    def __init__(
        self, folder: str | Path, final: str = "all", model: Mapping[str, Any] | None = None, config: str | None = None
    ) -> None:
        check_choice("final", final, FINAL)
        self.folder, self.final, self.model, self.config = Path(folder), final, model, config
        self.best: str | None = None
        self.written: dict[Path, Manifest] = {}

    def on_fit_end(self, trainer: pl.Trainer, learner: SplitLearner) -> None:  # type: ignore[override]
        learner.rounds.receive_pending()  # what is under way is of the training
        learner.rounds.find()
        weights, metrics, moment = self._take(trainer, learner)
        network = learner.network
        network.wire.ledger = learner.final_ledger
        try:
            left = list(hand_out(learner.rounds, moment, self.final))
        finally:
            network.wire.ledger = learner.ledger
        described = {role: self._describe(trainer, learner, role) for role in dict.fromkeys(each.role for each in left)}
        first: dict[Any, tuple[Path, str]] = {}  # of those who have the same tensors, in the simulator
        self.written = {}
        for each in left:
            place = self.folder / FOLDER if network.wire.party else self.folder / each.party / FOLDER
            manifest = described[each.role]
            told = {**weights, "stale": each.stale, "trained_at": each.trained_at, "digest": None, **manifest.weights}
            if each.stale:
                (place / WEIGHTS).unlink(missing_ok=True)
            else:
                told["digest"] = _write(place, _by_label(learner, each), first)
            self.written[place] = replace(manifest, party=each.party, weights=told, metrics=metrics)
        self._write_manifests()

    def on_test_end(self, trainer: pl.Trainer, learner: SplitLearner) -> None:  # type: ignore[override]
        if trainer.ckpt_path == self.best:
            tested = _measured(trainer.callback_metrics)
            self.written = {
                place: replace(manifest, metrics={**manifest.metrics, **tested})
                for place, manifest in self.written.items()
            }
            self._write_manifests()

    def _write_manifests(self) -> None:
        for place, manifest in self.written.items():
            write_whole(place / MANIFEST, manifest.to_json())

    def _take(
        self, trainer: pl.Trainer, learner: SplitLearner
    ) -> tuple[dict[str, Any], dict[str, float | None], Moment]:
        """Return which weights these are, their metrics, and them."""
        rounds, wire = learner.rounds, learner.network.wire
        callback, self.best = monitoring(trainer), best_of(trainer)
        checkpoint = SafeCheckpointIO().load_checkpoint(self.best) if self.best else None
        step = checkpoint["global_step"] if checkpoint else None
        holder = checkpoint["splitlearn"]["rounds"]["holder"] if checkpoint else None
        if len(set(wire.gather(step))) > 1 or holder in rounds.gone:
            rank_zero_warn(
                "the model folders have the last weights, since the parties do not have one best checkpoint: give all "
                "the same callbacks.checkpoint"
            )
            self.best = checkpoint = None
        if checkpoint is None or callback is None:
            check_finite(learner, trainer.global_step)
            metrics = _measured({**learner.measured, **trainer.callback_metrics})
            now = Moment({role: weights.tensors for role, weights in rounds.weights.items()}, rounds.sharings)
            return {"of": "last", "step": trainer.global_step}, metrics, now
        weights = {"of": "best", "step": step, "monitor": callback.monitor, "score": _number(callback.best_model_score)}
        return weights, _measured(checkpoint["splitlearn"]["measured"]), moment_of(checkpoint, rounds)

    def _describe(self, trainer: pl.Trainer, learner: SplitLearner, role: Role) -> Manifest:
        """What all who play a role are told alike."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        classes, shapes = getattr(data, "classes", None), _Shapes(trainer, learner)
        segments = learner.network.segments_of(role)
        _warn_of_other_state(segments)
        return Manifest(
            party=role,
            role=role,
            layout=learner.layout,
            run=learner.kind(data),
            weights={"unsaved": [name for segment in segments.values() for name in unsaved(segment)]},
            stages={name: shapes.into(name) for name in segments},
            inputs={
                name: {**shapes.of(name), **data.preparation(name)}
                for name in learner.layout.fields
                if learner.layout.owners[name] == role
            },
            crosses=list(shapes.crossing(role)),
            num_classes=learner.num_classes,
            classes=None if classes is None else list(map(str, classes)),
            output=OUTPUTS.get(type(learner.loss), type(learner.loss).__name__),
            model=self.model,
            config=self.config,
            metrics={},
            precision=str(trainer.precision),
            versions={
                "splitlearn": version("splitlearn"),
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
            date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        )


class _Shapes:
    """Shape, of a row, and dtype of what goes into the stages of a network and what crosses, as the trainer has it."""

    def __init__(self, trainer: pl.Trainer, learner: SplitLearner) -> None:
        network, self.convert = learner.network, trainer.precision_plugin.convert_input
        self.layout, self.owners = learner.layout, {**learner.layout.owners, **network.owners}
        self.values = {name: value.to("meta") for name, value in {**network.sample, **network.shapes}.items()}

    def of(self, name: str) -> dict[str, Any]:
        return self._told(self.values[name])

    def into(self, name: str) -> dict[str, Any]:
        (inputs,) = (stage.inputs for stage in self.layout.stages if stage.name == name)
        return self._told(join([self.values[each] for each in inputs]))

    def crossing(self, role: Role) -> Iterator[dict[str, Any]]:
        for stage in self.layout.stages:
            for name in stage.inputs:
                src, dst = self.owners[name], stage.role
                if src != dst and role in (src, dst):
                    yield {"value": name, "src": src, "dst": dst, **self.of(name)}

    def _told(self, value: Tensor) -> dict[str, Any]:
        return shape_and_dtype(self.convert(value))


def _warn_of_other_state(segments: Mapping[str, Segment]) -> None:
    if odd := [name for segment in segments.values() for name in no_tensors(segment)]:
        rank_zero_warn(f"{', '.join(odd)} is no weight and no buffer, and not in the model folder: make a buffer of it")


def _by_label(learner: SplitLearner, left: Left) -> dict[str, Tensor]:
    """What a party is left with, by the names of a model folder."""
    weights = learner.rounds.weights[left.role]
    known = {id(tensor): name for name, tensor in weights.tensors.items()}
    live = {
        label: tensor
        for segment in learner.network.segments_of(left.role).values()
        for label, tensor in named(segment).items()
    }
    moved = {label: left.weights[known[id(tensor)]] for label, tensor in live.items() if id(tensor) in known}
    return {**live, **moved}  # frozen blocks everybody has as they are


def _write(place: Path, tensors: Mapping[str, Tensor], first: dict[Any, tuple[Path, str]]) -> str:
    """Return the digest of the file."""
    memory = tuple((name, tensor.data_ptr()) for name, tensor in tensors.items())
    if memory in first:
        share_weights(place, first[memory][0])
    else:
        first[memory] = place, write_weights(place, tensors)
    return first[memory][1]


def _measured(metrics: Mapping[str, Any]) -> dict[str, float | None]:
    return {name: _number(value) for name, value in metrics.items() if name.startswith(MEASURED)}


def _number(value: Any) -> float | None:
    """JSON knows no NaN."""
    return float(value) if value is not None and math.isfinite(value) else None
