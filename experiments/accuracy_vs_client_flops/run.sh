#!/bin/bash
# Remakes everything in results/. MNIST is read from, or downloaded to, the folder that SPLITLEARN_DATA names.
set -eu
here=$(dirname "$0")
runs=outputs/accuracy_vs_client_flops

# A run that diverges fails its sweep at the end, and plot.py does without it.
train() {
    OMP_NUM_THREADS=1 python -m splitlearn.train -m +experiment=accuracy_vs_client_flops partition="$1" \
        schedule=centralised,sequential,splitfed_v1,fedavg,splitfed_v2,large_batch optimizer.lr=0.03,0.1,0.3 \
        trainer.accelerator=cpu trainer.enable_progress_bar=false trainer.enable_checkpointing=false logger=none \
        '~callbacks.per_alice' hydra.sweep.dir="$runs" \
        'hydra.sweep.subdir=${hydra:runtime.choices.partition}/${hydra:runtime.choices.schedule}/${optimizer.lr}' || true
}

rm -rf "$runs"
train iid & # one partition on each of two cores
train label_shards
wait
python "$here/plot.py" "$runs" mnist
