#!/bin/sh
# Remakes everything in results/. MNIST is read from, or downloaded to, the folder that SPLITLEARN_DATA names.
set -eu
here=$(dirname "$0")
runs=outputs/forgetting

rm -rf "$runs"
OMP_NUM_THREADS=1 python -m splitlearn.train -m +experiment=forgetting schedule=sequential,splitfed_v2 \
    schedule.order=fixed,random,cyclic schedule.turn=epoch,5,1 \
    trainer.accelerator=cpu trainer.enable_progress_bar=false trainer.enable_checkpointing=false logger=none \
    hydra.sweep.dir="$runs" \
    'hydra.sweep.subdir=${hydra:runtime.choices.schedule}/${schedule.order}/${schedule.turn}'
python "$here/plot.py" "$runs"
