#!/bin/sh
# Prints the table and keeps it as results/table.md, then draws results/break_even.png. Nothing is trained, no data is read.
set -eu
here=$(dirname "$0")
python "$here/table.py"
python "$here/plot.py"
