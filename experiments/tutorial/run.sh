#!/bin/sh
# Remakes everything in results/. MNIST is read from, or downloaded to, the folder that SPLITLEARN_DATA names.
set -eu
here=$(dirname "$0")
run=outputs/tutorial

# Beside an older last.ckpt Lightning writes last-v1.ckpt, and the figure would show the older one.
rm -rf "$run"
python "$here/by_hand.py" --results "$here/results/by_hand.json"
# On the CPU, where the loop by hand runs: another device adds in another order and gives other last bits.
python -m splitlearn.train +experiment=mnist_2party trainer.accelerator=cpu hydra.run.dir="$run"
cp "$run/results.json" "$here/results/lightning.json"
python "$here/compare.py" "$here/results/by_hand.json" "$here/results/lightning.json"
python "$here/plot.py" "$run/checkpoints/last.ckpt"
