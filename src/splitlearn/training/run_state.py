"""What a checkpoint has beside Lightning's own, so that a resumed run has the bits of one that was not interrupted."""

from __future__ import annotations

from typing import Any

from splitlearn.training.pace import go_on


def state_of(learner: Any) -> dict[str, Any]:
    """Of a SplitLearner: where rounds and epoch stand, what has crossed, and what no `state_dict` has."""
    waiting = learner.stepper.waiting
    return {
        "rounds": learner.rounds.state_dict(),
        "bytes": [learner.ledger.table(), learner.evaluation_ledger.table()],
        "passes": dict(learner.ledger.passes),
        "loss": learner.epoch_loss.state_dict(),
        "measured": dict(learner.trainer.callback_metrics),
        "buffers": learner.network.unsaved(),
        "left": learner.pace.left,
        "accumulated": {"waiting": waiting, "gradients": learner.rounds.gradients} if waiting else {},
    }


def restore(learner: Any, state: dict[str, Any], fit_loop: dict[str, Any] | None) -> None:
    """Give the learner back what `state_of` has told; `fit_loop`, Lightning's, goes on where training does."""
    learner.rounds.load_state_dict(state["rounds"])
    learner.network.load_unsaved(state.get("buffers", {}))
    if fit_loop is None:
        return
    learner.ledger.load(state["bytes"][0])
    learner.evaluation_ledger.load(state["bytes"][1])
    learner.epoch_loss.load_state_dict(state["loss"])
    learner.ledger.passes, learner.measured = state["passes"], state["measured"]
    learner.accumulated = state["accumulated"]
    go_on(fit_loop, state["left"])
