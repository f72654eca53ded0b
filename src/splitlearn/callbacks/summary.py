"""What is told of a run at its end."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytorch_lightning as pl
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.loggers import Logger
from rich.console import Console
from rich.table import Table

from splitlearn.saved.loading import FOLDER
from splitlearn.saved.manifest import MANIFEST

FEW = 8  # parties that are named

# What a table of runs is for; all of a run's configuration stands in its folder.
COMPARED = (
    "seed",
    "num_alices",
    "layout",
    "model",
    "schedule",
    "optimizer",
    "optimizers",
    "data.batch_size",
    "trainer.max_epochs",
)


def log_hyperparameters(cfg: DictConfig, trainer: pl.Trainer, metrics: dict[str, float]) -> None:
    params = {key.replace(".", "/"): OmegaConf.select(cfg, key) for key in COMPARED}
    params = {key: OmegaConf.to_container(v) if OmegaConf.is_config(v) else v for key, v in params.items()}
    for logger in trainer.loggers:
        if isinstance(logger, pl.loggers.TensorBoardLogger):
            logger.log_hyperparams(params, metrics, step=trainer.global_step)
            logger.save()


@contextmanager
def finishing(loggers: Sequence[Logger]) -> Iterator[None]:
    """Ends every logger with its job, however that ends: one that lives in the process would go on in the next."""
    status = "failed"
    try:
        yield
        status = "success"
    finally:
        for logger in loggers:
            logger.finalize(status)
            # What Lightning does not end is a run of W&B; asked for by `experiment`, one that never began would begin.
            finish = getattr(getattr(logger, "_experiment", None), "finish", None)
            if finish is not None:
                finish()


def print_table(
    title: str, metrics: Mapping[str, float], num_bytes: Mapping[str, Mapping[str, int]], output_dir: str | Path
) -> None:
    """`num_bytes` are those of training, by direction and kind, as `Ledger.table` has them."""
    table = Table("", "result", title=title)
    for name, value in metrics.items():
        table.add_row(name, f"{value:.4f}")
    for pair, kinds in num_bytes.items():
        table.add_row(pair, ", ".join(f"{kind} {count:,} bytes" for kind, count in kinds.items()))
    table.add_row("output", str(output_dir))
    Console().print(table)
    if models := _models_in(Path(output_dir)):
        print(f"The trained models are in {models}: splitlearn.load('{output_dir}') reads them")


def _models_in(folder: Path) -> str:
    """Where a run has left model folders, `outputs/.../{alice0,bob}/model`; nothing where it has left none."""
    parties = sorted(path.parent.parent.name for path in folder.glob(f"*/{FOLDER}/{MANIFEST}"))
    some = "*" if len(parties) > FEW else f"{{{','.join(parties)}}}" if len(parties) > 1 else "".join(parties)
    return str(folder / some / FOLDER) if parties else ""


def quieten() -> None:
    """Silence what Lightning and torch say about choices that are made here on purpose."""
    chatter = ("Tip:", "GPU available: False", "TPU available: False", "`weights_only` was not set")
    for name in ("utilities.rank_zero", "trainer.connectors.checkpoint_connector"):
        logging.getLogger(f"pytorch_lightning.{name}").addFilter(
            lambda record: not any(words in str(record.msg) for words in chatter)
        )
    for message in (
        "Using ModelCheckpoint with manual optimization",
        "The number of training batches",
        "Total length of `list` across ranks is zero",
        "Checkpoint directory .* exists and is not empty",
        "The dirpath has changed from",
        r"`isinstance\(treespec, LeafSpec\)` is deprecated",
    ):
        warnings.filterwarnings("ignore", message)
