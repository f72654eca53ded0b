"""The weighted mean of what arrives one after the other, against sums of whole numbers and of fractions."""

from fractions import Fraction
from itertools import permutations

import pytest
import torch

from splitlearn.schedules.weighted_mean import WeightedMean


def mean_of(sent, weights, like=None):
    """Add all in order, and return what the mean writes."""
    mean = WeightedMean()
    for tensors, weight in zip(sent, weights, strict=True):
        mean.add(tensors, weight)
    written = {name: torch.zeros_like(tensor) for name, tensor in (like or sent[0]).items()}
    mean.write(written)
    return written


def test_the_mean_counts_each_sender_by_her_weight():
    sent = [{"a": torch.tensor([1.0, 10.0])}, {"a": torch.tensor([4.0, 40.0])}]
    assert mean_of(sent, [1, 2])["a"].tolist() == [3.0, 30.0]
    assert mean_of(sent, [1, 1])["a"].tolist() == [2.5, 25.0]
    assert mean_of(sent, [5, 1])["a"].tolist() == [1.5, 15.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_mean_is_the_exact_one_rounded_once(dtype):
    """Fractions know no rounding. The weights are numbers of samples up to 60,000."""
    generator = torch.Generator().manual_seed(0)
    weights = [60000, 59999, 1, 17, 32768]
    sent = [{"a": torch.randn(200, generator=generator).to(dtype)} for _ in weights]
    rows = zip(*(tensors["a"].tolist() for tensors in sent), strict=True)
    exact = [sum(w * Fraction(v) for w, v in zip(weights, row, strict=True)) / sum(weights) for row in rows]
    expected = torch.tensor([float(value) for value in exact], dtype=torch.float64).to(dtype)
    written = mean_of(sent, weights)["a"]
    assert written.dtype == dtype
    assert torch.equal(written, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_order_of_arrival_changes_no_bit(dtype):
    generator = torch.Generator().manual_seed(0)
    arrivals = [
        ({"a": (torch.randn(500, generator=generator) * scale).to(dtype), "n": torch.tensor(count)}, weight)
        for scale, count, weight in ((1, 3, 60000), (1e-3, 9, 7), (100, 4, 1), (1, 1, 12345), (1e-4, 8, 59999))
    ]
    means = [mean_of(*zip(*order, strict=True)) for order in permutations(arrivals)]
    assert len(means) == 120
    assert all(torch.equal(mean["a"], means[0]["a"]) and mean["n"].item() == 9 for mean in means)


@pytest.mark.parametrize("weights", [[1], [60000], [3, 7, 9], [60000, 1, 59999] * 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_mean_of_equal_weights_is_these_to_the_bit(weights, dtype):
    value = torch.tensor([1 / 3, -1e-7, 16777217.0, 0.0, 6e-8]).to(dtype)
    written = mean_of([{"a": value}] * len(weights), weights)["a"]
    assert torch.equal(written, value)


def test_counters_stay_whole_and_the_largest_stays():
    """An optimizer's step count is one, though torch keeps it as a float; a weight of that name is not."""
    sent = [
        {
            "bn.num_batches_tracked": torch.tensor(count),
            "0/step": torch.tensor(float(count)),
            "step": torch.tensor(value),
        }
        for count, value in ((2, 1.0), (7, 2.0), (5, 6.0))
    ]
    written = mean_of(sent, [1, 1, 1])
    assert written["bn.num_batches_tracked"].dtype == torch.int64
    assert {name: tensor.item() for name, tensor in written.items()} == {
        "bn.num_batches_tracked": 7,
        "0/step": 7.0,
        "step": 3.0,
    }


def test_every_round_begins_anew():
    mean = WeightedMean()
    written = {"a": torch.zeros(1), "n": torch.tensor(0)}
    for value, count in ((1.0, 9), (5.0, 4)):  # the counter of a later round may be smaller
        mean.add({"a": torch.tensor([value]), "n": torch.tensor(count)}, 3)
        mean.write(written)
        assert (written["a"].item(), written["n"].item()) == (value, count)


def test_what_nobody_has_sent_has_no_mean_and_what_one_has_not_sent_is_zero(tmp_path):
    """Also behind a round in which it had one, and behind a checkpoint of the next."""
    mean, resumed = WeightedMean(), WeightedMean()
    mean.add({"a": torch.tensor([3.0]), "b": torch.tensor([1.0]), "n": torch.tensor(7)}, 1)
    mean.add({"a": torch.tensor([3.0])}, 2)
    assert {name: tensor.item() for name, tensor in mean.take().items()} == {
        "a": 3.0,
        "b": pytest.approx(1 / 3),
        "n": 7,
    }
    mean.add({"a": torch.tensor([5.0])}, 3)
    torch.save(mean.state_dict(), tmp_path / "ckpt")
    resumed.load_state_dict(torch.load(tmp_path / "ckpt", weights_only=True))
    assert mean.take() == resumed.take() == {"a": torch.tensor([5.0])}


def test_what_is_sent_is_not_changed_and_not_held():
    sent = {"a": torch.tensor([1.0]), "n": torch.tensor(4)}
    mean = WeightedMean()
    mean.add(sent, 2)
    for tensor in sent.values():
        tensor.fill_(100)
    mean.add({"a": torch.tensor([4.0]), "n": torch.tensor(3)}, 1)
    written = {"a": torch.zeros(1), "n": torch.tensor(0)}
    mean.write(written)
    assert (written["a"].item(), written["n"].item()) == (2.0, 4)


def test_half_a_mean_survives_a_checkpoint(tmp_path):
    first, resumed = WeightedMean(), WeightedMean()
    first.add({"a": torch.tensor([0.1]), "n": torch.tensor(5)}, 60000)
    torch.save(first.state_dict(), tmp_path / "ckpt")
    resumed.load_state_dict(torch.load(tmp_path / "ckpt", weights_only=True))
    written = []
    for mean in (first, resumed):
        mean.add({"a": torch.tensor([0.7]), "n": torch.tensor(4)}, 7)
        written.append({"a": torch.zeros(1), "n": torch.tensor(0)})
        mean.write(written[-1])
    assert torch.equal(written[0]["a"], written[1]["a"])
    assert written[0]["n"].item() == written[1]["n"].item() == 5
