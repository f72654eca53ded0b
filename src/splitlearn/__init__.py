"""Split learning: one network, trained across parties that share neither data nor model.

Start reading at `layout`, then `cut`, `network` and `learner`. What these names stand for is imported when it is asked
for: `import splitlearn` itself takes no time.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from splitlearn import models
    from splitlearn.data import Source, SplitData
    from splitlearn.data.sources import digits, image_folder, mnist
    from splitlearn.data.table import table
    from splitlearn.layout import Layout, extended_vanilla, multi_hop, two_party, u_shaped, vertical, whole
    from splitlearn.learner import SplitLearner
    from splitlearn.network import SplitNetwork
    from splitlearn.saved import load
    from splitlearn.schedules import Schedule

__all__ = [
    "Layout",
    "Schedule",
    "Source",
    "SplitData",
    "SplitLearner",
    "SplitNetwork",
    "digits",
    "extended_vanilla",
    "image_folder",
    "load",
    "mnist",
    "models",
    "multi_hop",
    "table",
    "two_party",
    "u_shaped",
    "vertical",
    "whole",
]

_PLACES = {
    **dict.fromkeys(("Source", "SplitData"), "data"),
    **dict.fromkeys(("digits", "image_folder", "mnist"), "data.sources"),
    "table": "data.table",
    **dict.fromkeys(
        ("Layout", "extended_vanilla", "multi_hop", "two_party", "u_shaped", "vertical", "whole"), "layout"
    ),
    "SplitLearner": "learner",
    "SplitNetwork": "network",
    "load": "saved",
    "Schedule": "schedules",
}


def __getattr__(name: str) -> Any:
    if name == "models":
        return import_module("splitlearn.models")
    if name not in _PLACES:
        raise AttributeError(f"splitlearn has no {name}; it has {', '.join(__all__)}")
    return getattr(import_module(f"splitlearn.{_PLACES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
