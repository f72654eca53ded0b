"""Model folders: what a run leaves of its network, a folder for each party, and how it is read back.

`manifest` says all that is needed to use a party's segments, `folder` writes and reads their weights beside it, and
`loading` makes modules of them. `programs` writes a module as a file that runs without its code and compares the two,
`notes` says beside it what it is, and `exporting` does so with what is in model folders. Start at `loading`.
"""

from splitlearn.saved.loading import load

__all__ = ["load"]
