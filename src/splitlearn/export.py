"""What was trained as ONNX and `torch.export` programs: `python -m splitlearn.export run=outputs/DATE/TIME`."""

from __future__ import annotations

import sys

import hydra
from omegaconf import DictConfig

from splitlearn.build import as_input_error, make, one_line
from splitlearn.errors import InputError
from splitlearn.saved import exporting
from splitlearn.train import CONF


def export(cfg: DictConfig) -> None:
    """Export as asked, and print a line for each check. Raises InputError for what does not fit."""
    if cfg.run is None:
        raise InputError("`run` must be given: run=FOLDER, of a run that has ended")
    with as_input_error():
        model = make(cfg.model, _partial_=True) if cfg.model._target_ is not None else None
    for line in exporting.export(cfg.run, cfg.what, cfg.format, cfg.rows, cfg.alice, model):
        print(line, flush=True)


@hydra.main(version_base="1.3", config_path=CONF, config_name="export")
def main(cfg: DictConfig) -> None:
    try:
        export(cfg)
    except InputError as error:
        sys.exit(f"splitlearn: {one_line(error)}")


if __name__ == "__main__":
    main()
