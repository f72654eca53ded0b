"""Who trains when, and what happens to weights between turns.

`schedule` arranges turns and rounds. `weights` is what a role trains; `sharing` and `aggregation` are what becomes of
it between turns, and `weighted_mean` is their arithmetic. `rounds` moves the weights in a run. Start at `schedule`.
"""

from splitlearn.schedules.schedule import Schedule

__all__ = ["Schedule"]
