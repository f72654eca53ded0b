"""Data: sources of rows, their preparation, and the loaders that deal them out in turns."""

from splitlearn.data.module import SplitData
from splitlearn.data.sources import Source

__all__ = ["Source", "SplitData"]
