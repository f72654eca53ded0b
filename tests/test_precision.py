"""Half and double precision train as a hand-written loop does, to the bit, and halve or double what crosses."""

from functools import partial

import pytest
import torch
from helpers import ADAM, SGD, make_rows, net
from pytorch_lightning import Trainer
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.plugins.precision import MixedPrecision
from runs import by_hand, difference, fit, make_data, weights
from torch import nn
from torch.utils.data import TensorDataset

from splitlearn.data import Source, SplitData
from splitlearn.data.rows import InMemory, Normalise

BFLOAT16 = partial(torch.autocast, "cpu", dtype=torch.bfloat16)
FLOAT16 = partial(torch.autocast, "cpu", dtype=torch.float16)


class Caching(MixedPrecision):
    """Keeps autocast's copies of the weights for a whole training step, as Lightning 2.5 does."""

    def autocast_context_manager(self):
        return torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=True)


@pytest.mark.parametrize("length", [1, 50])
@pytest.mark.parametrize("plugin", [MixedPrecision, Caching])
def test_bf16_equals_a_hand_loop_under_autocast(tmp_path, length, plugin):
    precision = {"plugins": [plugin("bf16-mixed", "cpu")]}
    learner, _ = fit(tmp_path, steps_per_execution=length, trainer=precision)
    expected, _ = by_hand(autocast=BFLOAT16)
    assert difference(weights(learner), expected) == []
    assert difference(expected, by_hand()[0]) != []
    smashed = 2 * 39 * 10 * 2  # epochs x rows x elements behind block2 x bytes
    assert learner.ledger.table() == {"alice0->bob": {"activation": smashed}, "bob->alice0": {"gradient": smashed}}


def test_bf16_is_asked_for_by_name(tmp_path):
    learner, _ = fit(tmp_path, trainer={"precision": "bf16-mixed"})
    assert difference(weights(learner), by_hand(autocast=BFLOAT16)[0]) == []


def test_64_true_trains_in_double(tmp_path):
    learner, _ = fit(tmp_path, trainer={"precision": "64-true"})
    data = make_data()
    data.rows.fields["x"] = make_rows(39)[0].double()
    assert difference(weights(learner), by_hand(model=net().double(), data=data)[0]) == []
    assert learner.ledger.table()["alice0->bob"] == {"activation": 2 * 39 * 10 * 8}


def test_a_run_of_fewer_bits_takes_none_from_the_next(tmp_path):
    """Each run on rows that others were trained on equals the run on rows of its own, in whatever order they come."""
    data = make_data()
    for i, precision in enumerate(("32-true", "bf16-true", "32-true", "64-true", "32-true", "64-true")):
        used, _ = fit(tmp_path / f"{i}a", data=data, trainer={"precision": precision})
        own, _ = fit(tmp_path / f"{i}b", trainer={"precision": precision})
        assert difference(weights(used), weights(own)) == []


def test_rows_are_held_twice_only_where_the_trainer_has_another_type():
    rows, cpu = InMemory(*make_rows(3), Normalise()), torch.device("cpu")
    held = rows.fields["x"].data_ptr()
    for dtype, copies in ((torch.float32, 1), (torch.bfloat16, 2), (torch.float32, 1)):
        rows.place(dtype, cpu)
        assert len({held, rows.as_read["x"].data_ptr(), rows.fields["x"].data_ptr()}) == copies
        assert rows.fields["y"] is rows.as_read["y"]


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize(("precision", "dtype"), [("32-true", torch.float32), ("64-true", torch.float64)])
def test_float64_rows_are_in_the_precision_of_the_trainer(in_memory, precision, dtype):
    x = torch.rand(20, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    source = Source(TensorDataset(x, torch.arange(20) % 2), None, 2)
    data = SplitData(source, val_fraction=0.0, in_memory=in_memory)
    assert data.sample()["x"].dtype == torch.float32  # by which a network takes its shapes
    data.trainer = Trainer(precision=precision, accelerator="cpu", logger=False, enable_checkpointing=False)
    data._place(data.rows)
    (fields,) = data.rows.stream([torch.arange(20)], torch.device("cpu"))
    assert torch.equal(fields["x"], x.to(dtype))  # 64-true loses nothing on the way


def make_scaler():
    """Starts so high that the first gradients are infinite, and doubles after two good steps."""
    return torch.amp.GradScaler("cpu", init_scale=2.0**21, growth_interval=2)


class Scales(Callback):
    def __init__(self) -> None:
        self.scales = []

    def on_before_zero_grad(self, trainer, learner, optimizer) -> None:
        if optimizer is trainer.optimizers[0]:
            self.scales.append(learner.stepper.scaler.get_scale())


@pytest.mark.parametrize(("length", "clip", "make"), [(1, None, SGD), (50, 0.1, SGD), (50, None, ADAM)])
def test_16_mixed_scales_like_a_hand_loop_with_one_scaler(tmp_path, length, clip, make):
    scales, precision = Scales(), MixedPrecision("16-mixed", "cpu", scaler=make_scaler())
    learner, _ = fit(
        tmp_path,
        make=make,
        steps_per_execution=length,
        gradient_clip_val=clip,
        trainer={"plugins": [precision], "callbacks": [scales]},
    )
    norm = None if clip is None else partial(nn.utils.clip_grad_norm_, max_norm=0.1)
    expected, updated = by_hand((make, make), clip=norm, autocast=FLOAT16, scaler=make_scaler())
    assert difference(weights(learner), expected) == []
    assert scales.scales == [2.0**21, *updated[:-1]]
    assert learner.stepper.scaler.get_scale() == updated[-1]
    halved = [after < before for before, after in zip(scales.scales, updated, strict=True)]
    assert halved[0]  # a step was skipped ...
    assert not all(halved)  # ... and not every one
    assert learner.ledger.table()["bob->alice0"] == {"gradient": 2 * 39 * 10 * 2}


def test_a_skipped_step_changes_no_weight(tmp_path):
    precision = MixedPrecision("16-mixed", "cpu", scaler=make_scaler())
    learner, _ = fit(tmp_path, trainer={"plugins": [precision], "max_steps": 1})
    initial = dict(net().named_parameters())
    trained = {name.split(".", 2)[2]: p for name, p in learner.network.named_parameters()}
    assert difference({n: p.data for n, p in trained.items()}, {n: p.data for n, p in initial.items()}) == []


@pytest.mark.parametrize("length", [1, 50])
def test_the_hooks_see_scaled_losses_and_true_gradients(tmp_path, length):
    class Sees(Callback):
        losses, gradients = [], []

        def on_before_backward(self, trainer, learner, loss) -> None:
            self.losses.append(float(loss))

        def on_before_optimizer_step(self, trainer, learner, optimizer) -> None:
            self.gradients.append(max(float(p.grad.abs().max()) for p in optimizer.param_groups[0]["params"]))

    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    precision, sees = MixedPrecision("16-mixed", "cpu", scaler=scaler), Sees()
    fit(tmp_path, steps_per_execution=length, trainer={"plugins": [precision], "callbacks": [sees], "max_steps": 2})
    assert all(100 < loss < 10_000 for loss in sees.losses[-2:])
    assert all(0 < gradient < 10 for gradient in sees.gradients[-4:])
