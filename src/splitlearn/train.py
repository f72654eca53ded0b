"""Train a split network: `python -m splitlearn.train +experiment=digits_2party layout.cut=2`."""

from __future__ import annotations

import gc
import logging
import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from splitlearn.build import as_input_error, build, make, one_line
from splitlearn.callbacks.results import forget
from splitlearn.callbacks.summary import finishing, log_hyperparameters, print_table, quieten
from splitlearn.callbacks.tensorboard import has_many_alices
from splitlearn.errors import DivergedError, InputError
from splitlearn.federation.launch import federate
from splitlearn.federation.processes import PartyLostError, Processes
from splitlearn.federation.simulated import Simulated
from splitlearn.training.stopping import StoppedError, raising

HERE = Path(__file__).resolve().parent
# The wheel carries conf/ inside the package; in a checkout it stands at the top.
CONF = str(HERE / "conf" if (HERE / "conf").is_dir() else HERE.parents[1] / "conf")


def train(cfg: DictConfig) -> float | None:
    """Train and test as `cfg` says; return its `metric`, for a sweeper.

    Raises InputError, before training starts, for what does not fit.
    """
    check_keys(cfg)
    forget(cfg.output_dir, cfg.ckpt)
    with as_input_error():
        engine = make(cfg.engine)
    metrics = federate(cfg, engine) if isinstance(engine, Processes) else _simulate(cfg, engine)
    if cfg.metric is not None and cfg.metric not in metrics:
        logging.getLogger(__name__).warning(
            "`metric` (=%s) was not measured, so a sweeper gets nothing; measured: %s", cfg.metric, ", ".join(metrics)
        )
    return metrics.get(cfg.metric)


def check_keys(cfg: DictConfig) -> None:
    """Raises InputError for a key at the top that nobody reads: neither the program, nor another key's value."""
    own = OmegaConf.load(f"{CONF}/train.yaml")
    groups = [next(iter(group)) for group in own.defaults if group != "_self_"]
    text = str(OmegaConf.to_container(cfg))
    unread = [key for key in map(str, cfg) if key not in (*own, *groups) and f"${{{key}" not in text]
    if unread:
        near = [f"{group}.{unread[0]}" for group in groups if OmegaConf.select(cfg, f"{group}.{unread[0]}") is not None]
        meant = f"did you mean {' or '.join(near)}?" if near else "leave it out"
        raise InputError(f"`{unread[0]}` (={cfg[unread[0]]}) is read by nobody: {meant}")


def _simulate(cfg: DictConfig, engine: Simulated) -> dict[str, float]:
    with as_input_error():
        run = build(cfg)
    with finishing(run.trainer.loggers):
        metrics = engine.run(run.trainer, run.learner, run.data, cfg.ckpt, cfg.test)
        log_hyperparameters(cfg, run.trainer, metrics)
    num_bytes = run.learner.ledger.table(merge=has_many_alices(run.learner))
    print_table(run.learner.layout.kind, metrics, num_bytes, run.trainer.default_root_dir)
    return metrics


@hydra.main(version_base="1.3", config_path=CONF, config_name="train")
def main(cfg: DictConfig) -> float | None:
    quieten()
    try:
        with raising():
            return train(cfg)
    except StoppedError as stop:
        print(f"splitlearn: {stop}", file=sys.stderr)
        raise
    except (InputError, DivergedError, PartyLostError, MisconfigurationException, OSError) as error:
        if HydraConfig.get().mode == RunMode.MULTIRUN:  # Hydra goes on with the sweep, and fails at its end
            raise error.with_traceback(None) from None  # which shows one, for what a line has told
        sys.exit(f"splitlearn: {one_line(error)}")
    finally:
        gc.collect()  # trainer, learner and data refer to each other: a sweep would keep every job's data set


if __name__ == "__main__":
    main()
