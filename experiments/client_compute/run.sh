#!/bin/sh
# Prints the table, in seconds, and keeps it as results/table.md. Nothing is trained and no data is read.
set -eu
python "$(dirname "$0")/table.py"
