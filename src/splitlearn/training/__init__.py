"""What the learner needs of Lightning and torch.

`pace` runs several mini-batches in a training step, `optimizers` steps one optimizer for each role, `metrics` adds up
losses and correct answers, `checks` says what does not fit together. Start at `pace`.
"""
