import math

import pytest
import torch

from splitlearn.costs.leakage import distance_correlation


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def by_the_definition(x: list[list[float]], y: list[list[float]]) -> float:
    """Székely & Rizzo 2014, (2.1) to (2.7), in plain Python."""
    n = len(x)

    def centred(rows) -> list[list[float]]:
        d = [[math.dist(p, q) for q in rows] for p in rows]
        total = sum(map(sum, d)) / ((n - 1) * (n - 2))
        return [
            [
                d[i][j] - sum(d[i]) / (n - 2) - sum(row[j] for row in d) / (n - 2) + total if i != j else 0.0
                for j in range(n)
            ]
            for i in range(n)
        ]

    def product(a, b) -> float:
        return sum(a[i][j] * b[i][j] for i in range(n) for j in range(n) if i != j) / (n * (n - 3))

    a, b = centred(x), centred(y)
    return product(a, b) / math.sqrt(product(a, a) * product(b, b))


def test_it_is_what_the_paper_defines():
    x, y = drawn(0, 7, 3), drawn(1, 7, 2)
    y[:, 0] += x[:, 0]
    assert distance_correlation(x, y) == pytest.approx(by_the_definition(x.tolist(), y.tolist()), rel=1e-12)


def test_four_points_by_hand():
    """On a line 0, 1, 2, 3: distances 1 2 3 | 1 2 | 1, whose rows sum to 6, 4, 4, 6, and all to 20.

    An entry loses half of both sums and gains 20/6: in thirds -2 1 1 | 1 1 | -2. Another order of the points has
    the -2 elsewhere: 0 2 1 3 has 1 -2 1 | 1 -2 | 1.
    """
    x = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
    products, squares = -2 - 2 + 1 + 1 - 2 - 2, 4 + 1 + 1 + 1 + 1 + 4
    assert distance_correlation(x, x[[0, 2, 1, 3]]) == pytest.approx(products / squares)


def test_the_same_rows_turned_scaled_and_moved_tell_everything():
    x = drawn(0, 20, 2, 3)
    turn, _ = torch.linalg.qr(drawn(1, 6, 6))
    assert distance_correlation(x, x) == pytest.approx(1)
    assert distance_correlation(x, 5 * x.flatten(1) @ turn - 2) == pytest.approx(1, abs=1e-5)


def test_independent_rows_tell_nothing_however_many_columns_there_are():
    """The V-statistic comes near 1 here: 20 rows of 500 columns."""
    values = [distance_correlation(drawn(seed, 20, 500), drawn(100 + seed, 20, 500)) for seed in range(30)]
    assert abs(sum(values) / 30) < 0.05
    assert min(values) < 0 < max(values)


def test_distances_are_not_squared():
    """Squared, they would see no more than linear correlation does, and a number and its size have none."""
    x = torch.linspace(-1, 1, 101).unsqueeze(1)
    assert distance_correlation(x, x.abs()) > 0.1


def test_rows_that_are_all_alike_tell_nothing():
    assert distance_correlation(drawn(0, 5, 2), torch.ones(5, 3)) == 0


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_of_what_is_not_finite_nothing_is_said(value):
    y = drawn(1, 5, 2)
    y[0, 0] = value
    assert math.isnan(distance_correlation(drawn(0, 5, 2), y))
    assert math.isnan(distance_correlation(y, torch.ones(5, 2)))


@pytest.mark.parametrize("rows", [(3, 3), (4, 5)])
def test_too_few_or_unequal_rows_are_refused(rows):
    with pytest.raises(ValueError, match=f"={rows[0]} and {rows[1]} rows.* the same number of rows, at least 4"):
        distance_correlation(torch.ones(rows[0], 1), torch.ones(rows[1], 1))
