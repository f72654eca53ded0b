import math
from collections import OrderedDict

import pytest
import torch
from torch import nn

from splitlearn.costs.by_cut import Terms, break_even, compare, measure
from splitlearn.costs.flops import cost_of
from splitlearn.costs.leakage import distance_correlation
from splitlearn.models import lenet

ROWS = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))


def tiny() -> nn.Sequential:
    """Weights 3x2 + 2, 2x4, 4x2 + 2: 8, 8 and 10 of them, 104 bytes."""
    torch.manual_seed(0)
    second = nn.Sequential(nn.Linear(2, 4, bias=False), nn.ReLU())
    return nn.Sequential(OrderedDict(first=nn.Linear(3, 2), second=second, head=nn.Linear(4, 2)))


def test_every_number_of_a_tiny_model_by_hand():
    model = tiny()
    first, second = compare(measure(model, ROWS), Terms([5, 2], batch_size=2, transfers=1))

    assert first[:3] == ("first", 8, 8 / 26)
    assert first.flops == 12 + 12  # forward, and the gradient of the weights; nobody wants one of the data
    assert first.flop_share == 24 / (24 + 3 * 16 + 3 * 16)
    assert (first.elements, first.sample_bytes) == (2, 8)
    assert first.epoch_bytes == 7 * 8 * 2 + 2 * 32  # there and back for seven rows; both Alices hand on
    assert first.epoch_seconds is None
    assert first.leakage == distance_correlation(ROWS, model.first(ROWS))

    assert second[:3] == ("second", 16, 16 / 26)
    assert (second.flops, second.flop_share) == (24 + 48, 72 / 120)
    assert (second.elements, second.sample_bytes) == (4, 16)
    assert second.epoch_bytes == 7 * 16 * 2 + 2 * 64
    assert second.leakage == distance_correlation(ROWS, model.second(model.first(ROWS)))


# Mini-batches of 2, 2 and 1 rows of the first Alice, and one of 2 of the second.
@pytest.mark.parametrize(
    ("terms", "num_messages", "num_bytes"),
    [
        ({}, 8, 7 * 8 * 2),
        ({"labels": True}, 8, 7 * 8 * 2 + 7 * 8),  # with what is sent up
        ({"transfers": 2}, 12, 7 * 8 * 2 + 4 * 32),
        ({"transfers": 1, "turn": 1}, 12, 7 * 8 * 2 + 4 * 32),
        ({"transfers": 1, "turn": 2}, 11, 7 * 8 * 2 + 3 * 32),
        ({"transfers": 2, "turn": "step"}, 17, 7 * 8 * 2 + (8 + 1) * 32),  # the second misses two steps
        ({"transfers": 1, "local_epochs": 3}, 26, 3 * 7 * 8 * 2 + 2 * 32),
        ({"transfers": 1, "local_epochs": 3, "turn": 2}, 24 + 7, 3 * 7 * 8 * 2 + 7 * 32),
        ({"transfers": 2, "share": 0.5}, 6, 7 * 8 + 2 * 32),
    ],
)
def test_an_epochs_messages_by_hand(terms, num_messages, num_bytes):
    terms = Terms([5, 2], batch_size=2, seconds=lambda size: 1000 + size, **terms)
    cut = compare(measure(tiny(), ROWS), terms)[0]
    assert cut.epoch_bytes == num_bytes
    assert cut.epoch_seconds == 1000 * num_messages + num_bytes


def test_the_tutorials_break_even_differs_fifteenfold_between_the_conventions():
    """784-128-640 | 10 and 60,000 images: 307.2 MB cross, 757,800 bytes of weights, of which 732,160 are Alice's."""
    crossing, bottom, model = 60_000 * 2 * 640 * 4, 4 * (785 * 128 + 129 * 640), 4 * (785 * 128 + 129 * 640 + 641 * 10)
    peer, server = (break_even(crossing, bottom, model, transfers) for transfers in (1, 2))
    assert (peer, server) == (393, 5991)


@pytest.mark.parametrize("crossing", [0, 1, 99, 100, 101, 1000])
@pytest.mark.parametrize("transfers", [1, 2])
def test_the_break_even_is_the_least_number_for_which_less_crosses(crossing, transfers):
    bottom, model = 30, 80
    found = break_even(crossing, bottom, model, transfers)
    assert found == min(k for k in range(1, 50) if crossing + transfers * k * bottom < 2 * k * model)


def test_who_holds_all_weights_never_breaks_even_by_the_server():
    assert break_even(1, 80, 80, transfers=2) == math.inf


def test_labels_that_cross_delay_the_break_even():
    without, with_labels = (
        compare(measure(tiny(), ROWS), Terms([10_000], batch_size=2, labels=labels))[0] for labels in (False, True)
    )
    # 2 K W - K B = 176 K bytes saved by K Alices, 160,000 to be made up for, and 80,000 of labels
    assert (without.break_even_peer, with_labels.break_even_peer) == (910, 1364)


def test_blocks_add_up_to_the_whole():
    model, x = lenet(10), torch.randn(4, 1, 8, 8)
    model.eval()(x)
    blocks = measure(model, x)
    assert sum(block.flops for block in blocks) == cost_of(model, [x[:1]], wants_input_gradient=False).total
    assert sum(block.parameters for block in blocks) == sum(p.numel() for p in model.parameters())


def test_behind_a_block_without_weights_nobody_wants_a_gradient_of_the_data():
    model = nn.Sequential(OrderedDict(flat=nn.Flatten(), first=nn.Linear(3, 2), head=nn.Linear(2, 2)))
    assert [block.flops for block in measure(model, ROWS)] == [0, 24, 24]


def test_behind_a_block_without_weights_a_gradient_is_still_wanted_further_down():
    model = nn.Sequential(OrderedDict(first=nn.Linear(3, 2), relu=nn.ReLU(), head=nn.Linear(2, 2)))
    assert [block.flops for block in measure(model, ROWS)] == [12 + 12, 0, 8 + 8 + 8]


def test_behind_what_is_frozen_no_gradient_comes_back():
    model = tiny().requires_grad_(False)
    model.head.requires_grad_(True)
    terms = Terms([5, 2], batch_size=2, labels=True, seconds=lambda size: 1000 + size)
    cuts = compare(measure(model, ROWS), terms)
    assert [cut.epoch_bytes for cut in cuts] == [7 * (8 + 8), 7 * (16 + 8)]
    assert [cut.epoch_seconds for cut in cuts] == [4 * 1000 + cut.epoch_bytes for cut in cuts]
    assert cuts[0].break_even_peer == 7 * (8 + 8) // (2 * 104 - 32) + 1


def test_more_local_epochs_delay_the_break_even_and_who_stays_away_does_not():
    measured = measure(tiny(), ROWS)
    terms = ({}, {"local_epochs": 2}, {"share": 0.5})
    found = [compare(measured, Terms([10_000], batch_size=2, **t))[0].break_even_peer for t in terms]
    assert found == [910, 320_000 // 176 + 1, 910]


def test_buffers_travel_with_the_weights_and_stay_as_they_were():
    model = nn.Sequential(OrderedDict(norm=nn.BatchNorm1d(3), head=nn.Linear(3, 2)))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    norm = measure(model, ROWS)[0]
    assert (norm.parameters, norm.weight_bytes) == (6, 4 * (3 + 3 + 3 + 3) + 8)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training
    assert model.norm.training


def test_rows_that_are_not_real_tell_of_no_leakage():
    assert [block.leakage for block in measure(tiny(), torch.zeros(2, 3), is_real=False)] == [None] * 3


def test_a_model_of_one_block_has_nothing_to_cut():
    with pytest.raises(ValueError, match=r"`model` has one block \(only\) and nothing to cut.*several named blocks"):
        compare(measure(nn.Sequential(OrderedDict(only=nn.Linear(3, 2))), ROWS), Terms([5], batch_size=2))
