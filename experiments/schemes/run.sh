#!/bin/sh
# Remakes everything in results/. MNIST is read from, or downloaded to, the folder that SPLITLEARN_DATA names.
set -eu
here=$(dirname "$0")
runs=outputs/schemes

rm -rf "$runs"
# On one thread of the CPU, and without the judge of each Alice, so that seconds compare.
OMP_NUM_THREADS=1 python -m splitlearn.train -m +experiment=schemes partition=iid,label_shards \
    schedule=centralised,sequential,splitfed_v1,splitfed_v2,splitfed_v3,parallel,fedavg,large_batch \
    trainer.accelerator=cpu trainer.enable_progress_bar=false trainer.enable_checkpointing=false logger=none \
    '~callbacks.per_alice' \
    hydra.sweep.dir="$runs" 'hydra.sweep.subdir=${hydra:runtime.choices.partition}/${hydra:runtime.choices.schedule}'
python "$here/plot.py" "$runs"
