#!/bin/bash
# The figure with CIFAR-10 and VGG-16, on a GPU; arguments are further overrides. CIFAR-10 is read from, or downloaded
# to, the folder that SPLITLEARN_DATA names.
set -eu
here=$(dirname "$0")
runs=outputs/accuracy_vs_client_flops_cifar10

rm -rf "$runs"
# A run that diverges fails the sweep at its end, and plot.py does without it.
python -m splitlearn.train -m +experiment=accuracy_vs_client_flops_cifar10 partition=iid,label_shards \
    schedule=centralised,sequential,splitfed_v1,fedavg,splitfed_v2,large_batch optimizer.lr=0.01,0.03,0.1 \
    trainer.enable_progress_bar=false trainer.enable_checkpointing=false logger=none '~callbacks.per_alice' \
    hydra.sweep.dir="$runs" \
    'hydra.sweep.subdir=${hydra:runtime.choices.partition}/${hydra:runtime.choices.schedule}/${optimizer.lr}' \
    "$@" || true
python "$here/plot.py" "$runs" cifar10
