"""Predict for new rows: `python -m splitlearn.predict run=FOLDER data.root=new.csv`."""

from __future__ import annotations

import csv
import sys
import time
from collections.abc import Mapping
from io import StringIO
from pathlib import Path
from typing import Any

import hydra
import pytorch_lightning as pl
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torch.nn import functional

from splitlearn.build import as_input_error, make, one_line
from splitlearn.callbacks.summary import print_table, quieten
from splitlearn.data.loader import EvalLoader
from splitlearn.data.new_rows import Kept, NewRows, new_rows, prepare
from splitlearn.data.rows import InMemory
from splitlearn.errors import InputError
from splitlearn.layout import Party, Role
from splitlearn.network import Batch, SplitNetwork
from splitlearn.saved.folder import write_whole
from splitlearn.saved.loading import choose, inputs_of, network_of, parts_of
from splitlearn.saved.manifest import Manifest
from splitlearn.train import CONF
from splitlearn.training.evaluation import Prediction


class Predictor(pl.LightningModule):
    """Runs rows through a trained network; the outputs go to `receiver`."""

    def __init__(self, network: SplitNetwork, cast: Mapping[Role, Party], receiver: Party) -> None:
        super().__init__()
        self.network, self.cast, self.receiver = network, cast, receiver

    def predict_step(self, batch: Batch, batch_idx: int) -> Prediction:
        return Prediction(batch.ids, self.network.predict(batch, self.cast, self.receiver), None)


def predict(cfg: DictConfig) -> dict[str, float]:
    """Write what the network of a run makes of new rows; return the metrics, where the rows have labels.

    Raises InputError for what does not fit.
    """
    folder, out = Path(cfg.run).expanduser(), Path(cfg.out).expanduser()
    if out.suffix != ".csv":
        raise InputError(f"`out` (={out}) must end in .csv, the one format that is written")
    parts = choose(folder, parts_of(folder), cfg.alice)
    manifest = parts[0].manifest
    inputs = inputs_of(parts)
    with as_input_error():
        rows = new_rows(cfg.data.root, inputs, manifest.classes, _kept(cfg, folder))
    labels = torch.zeros(len(rows.x), dtype=torch.int64) if rows.y is None else rows.y
    held = InMemory(rows.x, labels, lambda x: prepare(x, inputs))
    trainer = _trainer(cfg.accelerator, manifest.precision)
    held.place(trainer.precision_plugin.convert_input(torch.zeros(())).dtype, trainer.strategy.root_device)
    sample = {name: field[:2].cpu().float() for name, field in held.fields.items() if name != "y"}
    with as_input_error():
        model = make(cfg.model, _partial_=True) if cfg.model._target_ is not None else None
    network = network_of(parts, sample, model=model)
    cast = {part.manifest.role: part.manifest.party for part in parts}
    receiver = network.holder(cast) if cfg.receiver is None else cfg.receiver
    if receiver not in cast.values():
        raise InputError(f"`receiver` (={receiver}) must be one of the parties: {', '.join(cast.values())}")
    loader = EvalLoader(held, torch.arange(len(rows.x)), cfg.batch_size, trainer.strategy.root_device)
    begun = time.perf_counter()
    predictions: Any = trainer.predict(Predictor(network, cast, receiver), loader)
    seconds = time.perf_counter() - begun
    output = torch.cat([prediction.output.cpu() for prediction in predictions])
    _write(out, rows, output, manifest)
    metrics = _metrics(output, rows.y, manifest)
    print_table(f"{len(rows.ids)} rows", metrics, network.wire.ledger.table(), out)
    per_row = sum(network.wire.ledger.num_bytes.values()) / len(rows.ids)
    print(f"{per_row:,.0f} bytes and {1000 * seconds / len(rows.ids):.3g} ms a row; {receiver} has the outputs: {out}")
    return metrics


def _trainer(accelerator: str, precision: str) -> pl.Trainer:
    return pl.Trainer(
        accelerator=accelerator,
        devices=1,
        precision=precision,  # type: ignore[arg-type]
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def _kept(cfg: DictConfig, folder: Path) -> Kept:
    """How the rows are read: as asked, else as in the training, if its configuration stands in the folder."""
    path = folder / ".hydra" / "config.yaml"
    trained = OmegaConf.load(path) if path.is_file() else OmegaConf.create()
    asked = {name: OmegaConf.select(cfg.data, name) for name in Kept._fields}
    for name in Kept._fields:
        if asked[name] is None:
            asked[name] = OmegaConf.select(trained, f"data.{name}", throw_on_missing=False)
    return Kept(**{name: value for name, value in asked.items() if value is not None})


def _shares(output: Tensor, manifest: Manifest) -> Tensor:
    """Probabilities [N, classes], where the network's output is known to tell them; else the output."""
    if manifest.output == "logits":
        return functional.softmax(output.double(), dim=-1)
    return output.double().exp() if manifest.output == "log-probabilities" else output


def _write(out: Path, rows: NewRows, output: Tensor, manifest: Manifest) -> None:
    """A line for each row: its id, the class that is predicted, and a column for each class."""
    classes = manifest.classes or [str(i) for i in range(output.shape[-1])]
    shares, best = _shares(output, manifest).tolist(), output.argmax(dim=-1).tolist()
    text = StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(["id", "predicted", *classes])
    writer.writerows([id, classes[i], *line] for id, i, line in zip(rows.ids, best, shares, strict=True))
    write_whole(out, text.getvalue().encode(), "out")


def _metrics(output: Tensor, labels: Tensor | None, manifest: Manifest) -> dict[str, float]:
    if labels is None:
        return {}
    accuracy = (output.argmax(dim=-1) == labels).double().mean().item()
    losses = {"logits": functional.cross_entropy, "log-probabilities": functional.nll_loss}
    if manifest.output not in losses:
        return {"accuracy": accuracy}
    return {"loss": losses[manifest.output](output, labels).item(), "accuracy": accuracy}


@hydra.main(version_base="1.3", config_path=CONF, config_name="predict")
def main(cfg: DictConfig) -> None:
    quieten()
    try:
        if missing := sorted(OmegaConf.missing_keys(cfg)):
            raise InputError(f"`{missing[0]}` must be given: {missing[0]}=...")
        predict(cfg)
    except (InputError, OSError) as error:
        sys.exit(f"splitlearn: {one_line(error)}")


if __name__ == "__main__":
    main()
