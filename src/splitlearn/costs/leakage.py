"""How much of the inputs can be seen in what is sent."""

import torch
from torch import Tensor


def distance_correlation(x: Tensor, y: Tensor) -> float:
    """The squared distance correlation of the rows of x [N, ...] and y [N, ...], by the unbiased estimator.

    Székely & Rizzo, "Partial distance correlation with methods for dissimilarities", 2014 (arXiv 1310.2926): U-centred
    Euclidean distances, which are not squared. 1 for the same rows, also turned or scaled; around 0, on either side,
    for independent ones, where the older V-statistic grows with the number of columns. 0 where all rows are alike,
    NaN where a value is not finite: that says nothing about what can be seen.

    ValueError for another number of rows in y, or fewer than 4.
    """
    if len(x) != len(y) or len(x) < 4:
        raise ValueError(f"`x` and `y` (={len(x)} and {len(y)} rows) must have the same number of rows, at least 4")
    a, b = _centred(x), _centred(y)
    scale = a.norm() * b.norm()
    return 0.0 if scale == 0 else float((a * b).sum() / scale)


def _centred(x: Tensor) -> Tensor:
    """The distances between rows, U-centred [N, N]: each row and column sums to 0, and the diagonal is 0."""
    rows = x.detach().flatten(1).double()
    # By products of matrices, as is the default for many rows, the distance of a row to itself is not 0.
    distances = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")
    n = len(rows)
    row = distances.sum(dim=1, keepdim=True) / (n - 2)
    centred = distances - row - row.T + distances.sum() / ((n - 1) * (n - 2))
    return centred.fill_diagonal_(0)
