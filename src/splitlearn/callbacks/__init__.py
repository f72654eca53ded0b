"""What goes with a run: Lightning callbacks, and what they print and draw.

`progress`, `results` and `interrupt` are the terminal, results.json and Ctrl-C; `tensorboard`, `per_alice` and
`link_seconds` measure; `layout_drawing`, `partition_figure`, `summary` and `sweep_table` draw. Start at `results`.
"""
