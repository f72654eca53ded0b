"""What a run costs, and what each cut of a model would cost.

`flops` counts arithmetic by party; `link` and `timeline` turn messages into seconds; `by_cut` compares the cuts of a
model, with `leakage` as the price in privacy. Start at `by_cut`.
"""
