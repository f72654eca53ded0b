"""What can be said to a user in one line, without a stack trace."""


class InputError(ValueError):
    """What the user gave does not fit. The message names the value, the rule and the cure."""


CURE = "lower `optimizer.lr` or set `trainer.gradient_clip_val`"  # of a loss that diverges


class DivergedError(RuntimeError):
    """The loss is not a finite number."""
