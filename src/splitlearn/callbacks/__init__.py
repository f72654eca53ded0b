"""What goes with a run: Lightning callbacks, and what they print and draw.

`run_folder` comes before all; `progress`, `results` and `interrupt` are the terminal, results.json and Ctrl-C;
`tensorboard`, `per_alice` and `link_seconds` measure; `layout_drawing`, `partition_figure`, `summary` and `sweep_table`
draw. Start at `results`.
"""
