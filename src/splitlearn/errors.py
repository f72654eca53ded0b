"""What can be said to a user in one line, without a stack trace."""


class InputError(ValueError):
    """What the user gave does not fit. The message names the value, the rule and the cure."""


class DivergedError(RuntimeError):
    """The loss is not a finite number."""
