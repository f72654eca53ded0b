"""One process per party: what each is told to do, of a configuration that all share."""

from __future__ import annotations

import copy
import json
import logging
import os
import traceback
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from splitlearn.build import as_input_error, build, make, one_line, shared_by_all
from splitlearn.callbacks.layout_drawing import show
from splitlearn.callbacks.summary import finishing, log_hyperparameters, print_table, quieten
from splitlearn.certificates import Identity, make_identities
from splitlearn.errors import DivergedError, InputError
from splitlearn.federation.frame import FrameError
from splitlearn.federation.party import FAILED, Attempt, Federation, parties_of
from splitlearn.federation.processes import PartyLostError, Play, Post, Processes
from splitlearn.federation.sealing import SealError
from splitlearn.federation.wiring import GrpcWiring
from splitlearn.layout import Party
from splitlearn.saved.folder import write_whole
from splitlearn.training.stopping import StoppedError, call_when_stopped

INTERRUPT, DRAWING = "splitlearn.callbacks.interrupt.Interrupt", "splitlearn.callbacks.progress.Drawing"
COLUMN_OWNERS = ("vertical", "extended_vanilla")
# Of these one line says enough.
EXPECTED = (InputError, DivergedError, MisconfigurationException, FrameError, SealError)


def federate(cfg: DictConfig, engine: Processes) -> dict[str, float]:
    """Train and test with one process per party, all of them or the one that `engine.party` names.

    Returns the metrics; leaves `results.json` and a folder for each party in the run's folder. Raises InputError for
    what does not fit, PartyLostError when a party is lost and the run cannot go on.
    """
    _check(cfg, engine)
    with as_input_error():
        wiring = make(cfg.wire)
    output_dir = Path(cfg.output_dir).resolve()
    if engine.party is None and "TORCHELASTIC_RUN_ID" in os.environ:
        engine = _as_rank(cfg, engine)
    parties = [engine.party] if engine.party is not None else _plan(cfg)
    made = len(parties) > 1 and isinstance(wiring, GrpcWiring) and wiring.needs_certificates
    identities = make_identities(parties) if made else {}  # in memory alone, so that they end with the run
    plays: dict[Party, Play] = {
        party: partial(_play_of(cfg, engine, party, parties, output_dir), identities.get(party)) for party in parties
    }
    try:
        metrics = engine.launch(plays, str(output_dir))
    except (PartyLostError, StoppedError) as error:
        _write_results(output_dir, parties, stopped=str(error))
        raise
    results = _write_results(output_dir, parties)
    print_table("one process per party", metrics, results.get("bytes", {}), output_dir)
    return metrics


def play(text: str, engine: Processes, identity: Identity | None, attempt: Attempt, post: Post) -> None:
    """What the process of a party does; `text` is its configuration, `identity` one that was made for the run."""
    quieten()
    cfg = OmegaConf.create(text)
    assert isinstance(cfg, DictConfig)
    ckpt, cfg.ckpt, shared = cfg.ckpt, None, shared_by_all(cfg)
    federation = None
    try:
        with as_input_error():
            wiring = make(cfg.wire)
            if identity is not None:
                wiring.mine = identity
            terms = engine.timeout, engine.join_timeout, engine.save_every_n_steps
            federation = Federation(attempt, wiring, *terms, post)
            federation.waits = engine.on_failure == "wait"
            call_when_stopped(federation.stopped)
            call_when_stopped(federation.stopped, post.stops.get)
            run = build(cfg, federation.wire)
        with finishing(run.trainer.loggers):
            metrics = federation.run(run.trainer, run.learner, run.data, shared, cfg.output_dir, ckpt, cfg.test)
            log_hyperparameters(cfg, run.trainer, metrics)
        post({"done": metrics})
    except StoppedError:  # by `Halt`, behind a snapshot of all
        assert federation is not None
        federation.leave()
    except Exception as error:
        why = one_line(error)
        if not isinstance(error, EXPECTED):
            traceback.print_exc()
            why = f"its program failed by {type(error).__name__}: {why}"
        post({"error": f"{attempt.party}: {why}"})
        if federation is not None:
            federation.give_up(why)
        logging.shutdown()
        os._exit(FAILED)  # by force: the threads of the streams would keep it alive, and the others would wait for it


def _check(cfg: DictConfig, engine: Processes) -> None:
    if cfg.trainer.max_time is not None:
        raise InputError(
            f"`trainer.max_time` (={cfg.trainer.max_time}) would stop each process at another mini-batch: "
            "take trainer.max_steps or trainer.max_epochs"
        )
    if isinstance(cfg.trainer.val_check_interval, str | DictConfig):
        raise InputError(
            f"`trainer.val_check_interval` (={cfg.trainer.val_check_interval}) would validate at another mini-batch in "
            "each process: take a number of mini-batches, or a share of an epoch"
        )
    for name, callback in cfg.callbacks.items():
        if callback.get("train_time_interval") is not None:
            raise InputError(
                f"`callbacks.{name}.train_time_interval` (={callback.train_time_interval}) would save at another "
                "mini-batch in each process: take every_n_train_steps"
            )
    if any(str(callback.get("_target_")).endswith(".Timer") for callback in cfg.callbacks.values()):
        raise InputError("a Timer would stop each process at another mini-batch: take trainer.max_steps")
    if engine.on_failure == "skip" and str(cfg.layout._target_).endswith(COLUMN_OWNERS):
        raise InputError(
            "`engine.on_failure` (=skip) does not fit a layout in which every Alice owns columns: take stop or wait"
        )
    if cfg.link.bandwidth is not None:
        raise InputError(
            "`link` predicts in the simulator: take engine=simulated, or link=none, since time is measured"
        )
    if cfg.weights is not None:
        raise InputError(
            f"`weights` (={cfg.weights}) has the weights of all parties: take engine=simulated, start from model "
            "folders by init=FOLDER, or go on with the run of a folder by ckpt=FOLDER"
        )
    if cfg.ckpt is not None and not Path(cfg.ckpt).is_dir():
        raise InputError(f"`ckpt` (={cfg.ckpt}) must be the folder of a run: with engine=processes all parties resume")


def _as_rank(cfg: DictConfig, engine: Processes) -> Processes:
    """Under torchrun each rank plays a party. Lightning must not know of it: all ranks but the first log nothing."""
    rank, size, place = (int(os.environ.pop(name)) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    _take_gpu(cfg, place)
    for name in ("GROUP_RANK", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID"):
        os.environ.pop(name, None)
    parties = _plan(cfg)
    if size != len(parties):
        raise InputError(
            f"torchrun starts {size} processes, and the parties are {', '.join(parties)}: start one for each"
        )
    if cfg.wire.get("certificates") is not None:
        cfg.wire.certificates = f"{cfg.wire.certificates}/{parties[rank]}"
    address = f"{os.environ['MASTER_ADDR']}:{int(os.environ['MASTER_PORT']) + 1}"  # torchrun listens at the first
    return replace(engine, party=parties[rank], address=engine.address if engine.has_port else address)


def _plan(cfg: DictConfig) -> list[Party]:
    """Build the run as the simulator would, which checks it; draw it, and return the parties."""
    plan = copy.deepcopy(cfg)
    plan.logger, plan.callbacks, plan.ckpt, plan.test = {}, {}, None, "last"
    with as_input_error():
        run = build(plan)
    show(run.learner, run.data, run.data.sample())
    return parties_of(run.learner)


def _play_of(cfg: DictConfig, engine: Processes, party: Party, parties: list[Party], output_dir: Path) -> partial[None]:
    own = copy.deepcopy(cfg)
    OmegaConf.set_struct(own, False)
    own.output_dir = str(output_dir / party)
    if cfg.ckpt is not None:
        own.ckpt = str(Path(cfg.ckpt).resolve())
    if len(parties) > 1:
        if cfg.wire.get("certificates") is not None:
            own.wire.certificates = f"{cfg.wire.certificates}/{party}"
        _take_gpu(own, parties.index(party))
        own.trainer.enable_progress_bar = bool(cfg.trainer.enable_progress_bar) and party == parties[0]
    # A process of a party is told of Ctrl-C in another way; who starts all has drawn them.
    not_here = (INTERRUPT, DRAWING) if len(parties) > 1 else (INTERRUPT,)
    for name in [name for name, callback in own.callbacks.items() if callback["_target_"] in not_here]:
        own.callbacks.pop(name)
    OmegaConf.resolve(own)
    return partial(play, OmegaConf.to_yaml(own), engine)


def _take_gpu(cfg: DictConfig, place: int) -> None:
    """Those who are started together on a host take its GPUs in turn."""
    if torch.cuda.is_available() and cfg.trainer.accelerator in ("auto", "gpu", "cuda"):
        cfg.trainer.devices = [place % torch.cuda.device_count()]


def _write_results(output_dir: Path, parties: list[Party], **more: Any) -> dict[str, Any]:
    """The hub's results are everybody's: they stand in the folder of the run as well."""
    source = output_dir / parties[0] / "results.json"
    results: dict[str, Any] = json.loads(source.read_text()) if source.is_file() else {}
    write_whole(output_dir / "results.json", json.dumps({**results, **more}, indent=2) + "\n")
    return results
