"""A loss over all rows is the loss of all rows at once, whatever it divides by; one that does not fit is one line."""

import copy
import re

import pytest
import torch
from federated import run_tiny, source
from helpers import SEED, SGD, make_network, make_rows, net, smooth, weights_of
from pytorch_lightning.callbacks import ModelCheckpoint
from runs import TWO_PARTY, batches_of, make_data, make_trainer
from torch import Tensor, nn
from torchmetrics.functional.classification import multiclass_accuracy

from splitlearn.errors import InputError
from splitlearn.federation.frame import FrameError
from splitlearn.federation.remote_wire import RemoteWire
from splitlearn.layout import two_party, u_shaped
from splitlearn.learner import SplitLearner
from splitlearn.network import Batch, SplitNetwork
from splitlearn.schedules.aggregation import Average, MeanGradient
from splitlearn.schedules.schedule import Schedule
from splitlearn.schedules.sharing import Personal
from splitlearn.train import train
from splitlearn.training.losses import MeanLoss

NAMES = ("block1", "block2", "block3", "head")
TWO, U = two_party(NAMES, 2), u_shaped(NAMES, [1, 3])
WEIGHT = torch.tensor([1.0, 5.0, 0.5])
OPTIONS = {
    "a sum": (["+loss.reduction=sum"], {}),
    "class weights": (["loss.weight=[1,5,0.5]"], {"weight": WEIGHT}),
    "an ignored class": (["+loss.ignore_index=2"], {"ignore_index": 2}),
}


@pytest.mark.parametrize(("asked", "options"), OPTIONS.values(), ids=OPTIONS)
def test_the_losses_of_an_epoch_and_of_a_test_are_those_of_all_rows(asked, options, configure, tmp_path):
    """With a rate of zero all rows see one network; of one mini-batch the mean is torch's own."""
    still = ["optimizer=sgd", "optimizer.lr=0", "model._target_=federated.plain", "trainer.max_epochs=1"]
    small, large = (
        run_tiny(configure, tmp_path / size, *still, *asked, f"data.batch_size={size}", f"data.eval_batch_size={size}")
        for size in ("4", "64")
    )
    for name in ("train/loss", "val/loss"):
        assert small["epochs"][0][name] == pytest.approx(large["epochs"][0][name], rel=1e-5)
    x, y = source().test.tensors
    state = torch.load(tmp_path / "64" / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    model = smooth()
    model.load_state_dict({name.split(".", 3)[3]: value for name, value in state.items() if ".segments." in name})
    expected = nn.CrossEntropyLoss(**options)(model(x), y).item()
    assert small["test"]["test/loss"] == pytest.approx(expected, rel=1e-5)
    left_out = options.get("ignore_index")
    expected = multiclass_accuracy(model(x), y, 3, average="micro", ignore_index=left_out).item()
    assert small["test"]["test/accuracy"] == large["test"]["test/accuracy"] == pytest.approx(expected)


@pytest.mark.parametrize("asked", [asked for asked, _ in OPTIONS.values()], ids=OPTIONS)
@pytest.mark.parametrize("schedule", ["sequential", "parallel"])
@pytest.mark.slow
def test_processes_have_the_simulators_losses_and_weights(schedule, asked, configure, tmp_path):
    common = [f"schedule={schedule}", "num_alices=2", "optimizer=sgd", "optimizer.lr=0.01", *asked]
    simulated = run_tiny(configure, tmp_path / "simulated", *common)
    assert run_tiny(configure, tmp_path / "processes", *common, "engine=processes") == simulated


class Own(nn.Module):
    def forward(self, output: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(output, labels)


class Told(Own):
    def weight_of(self, labels: Tensor) -> int:
        return len(labels)


class Constant(nn.Module):
    def forward(self, output: Tensor, labels: Tensor) -> Tensor:
        return torch.zeros(())


def learner(loss: nn.Module, layout=TWO, alice=None, bob=None, **settings) -> SplitLearner:
    turns = {"turn": "step", "alice": alice, "bob": bob or MeanGradient()} if alice else {}
    schedule = Schedule(("alice0", "alice1"), **turns)
    sgd = lambda parameters: torch.optim.SGD(parameters, lr=0.1)  # noqa: E731
    return SplitLearner(make_network(layout, net()), schedule, sgd, loss, 3, **settings)


@pytest.mark.parametrize(
    ("loss", "settings", "message"),
    [
        (nn.CrossEntropyLoss(reduction="none"), {}, r"`loss` \(=CrossEntropyLoss\) must be one number"),
        (nn.MSELoss(), {}, r"`loss` \(=MSELoss\) does not take an output of shape \[2, 3\] and labels of shape \[2\]"),
        (nn.BCEWithLogitsLoss(), {}, r"`loss` \(=BCEWithLogitsLoss\) does not take"),
        (nn.CrossEntropyLoss(weight=torch.ones(2)), {}, r"`loss` \(=CrossEntropyLoss\) does not take .*weight"),
        (Constant(), {}, r"`loss` \(=Constant\) has no gradient"),
        (Own(), {"micro_batches": 2}, r"`loss` \(=Own\) must say what it divides by, since `micro_batches`"),
        (Own(), {"alice": MeanGradient()}, r"`loss` \(=Own\) must say what it divides by, since `schedule`"),
        (
            nn.CrossEntropyLoss(WEIGHT),
            {"layout": U, "alice": MeanGradient()},
            "weighs labels that only each",
        ),
    ],
)
def test_a_loss_that_does_not_fit_is_told_in_one_line(loss, settings, message):
    with pytest.raises(ValueError, match=message):
        learner(loss, **settings)


def test_a_loss_that_fits_is_taken():
    learner(Own())
    learner(Told(), micro_batches=2)
    learner(Told(), alice=MeanGradient())
    learner(nn.CrossEntropyLoss(WEIGHT), alice=MeanGradient())


def test_class_weights_come_from_the_command_line(configure, tmp_path):
    train(configure("loss.weight=[1,1,1,1,1,1,1,1,1,5]", "trainer.max_epochs=1", "trainer.limit_train_batches=2"))
    with pytest.raises(InputError, match=r"^`loss` \(=NLLLoss\) does not take .*weight"):
        train(configure("loss.weight=[1,5]"))


class Weighted(Own):
    """Divides by the class weights of the labels, as cross-entropy with `WEIGHT` does."""

    def weight_of(self, labels: Tensor) -> Tensor:
        return WEIGHT[labels].sum()


def test_a_loss_of_ones_own_is_put_together_by_what_it_divides_by():
    _, y = make_rows(5)
    hers = {"alice0": y[:3], "alice1": y[3:]}
    step = {alice: Batch(torch.arange(len(rows)), {"y": rows}, (0, 0)) for alice, rows in hers.items()}
    schedule = Schedule(("alice0", "alice1"), alice=MeanGradient(), bob=MeanGradient(), turn="step")
    own, torchs = (MeanLoss(loss, schedule, TWO) for loss in (Weighted(), nn.CrossEntropyLoss(WEIGHT)))
    assert [own.share(alice, step) for alice in step] == [torchs.share(alice, step) for alice in step]
    assert sum(len(batch.ids) * own.share(alice, step) for alice, batch in step.items()) == pytest.approx(5)
    value = torch.tensor(2.0)
    assert own.join([value], [own.weight_of(y)]).total == 2 * WEIGHT[y].sum()


SUM = nn.CrossEntropyLoss(reduction="sum")
ONE_SIDED = r"`loss` \(=CrossEntropyLoss\) {} all roles must take the mean of gradients by samples or none, not {}"


@pytest.mark.parametrize(
    ("loss", "alice", "bob", "does", "cure"),
    [
        (SUM, Personal(), MeanGradient(), "adds up", "bob"),
        (nn.CrossEntropyLoss(WEIGHT), Personal(), MeanGradient(), "weighs labels", "bob"),
        (nn.CrossEntropyLoss(ignore_index=2), Average(), MeanGradient(), "weighs labels", "bob"),
        (SUM, MeanGradient(), Average(), "adds up", "alice"),
        (SUM, MeanGradient(), MeanGradient("uniform"), "adds up", "alice"),
    ],
)
def test_what_must_be_shared_out_for_one_role_alone_is_refused(loss, alice, bob, does, cure):
    """The multiple of her loss that is right for the mean over all rows is not her own loss, by which she steps."""
    told = re.escape(f"`schedule.alice` (={alice}) and `schedule.bob` (={bob}): take a loss that is a mean over rows, ")
    with pytest.raises(ValueError, match=ONE_SIDED.format(f"{does}, so that", f"{told}or schedule.{cure}.weighting")):
        learner(loss, alice=alice, bob=bob)
    uniform = MeanGradient("uniform")
    learner(loss, alice=uniform if cure == "alice" else alice, bob=uniform if cure == "bob" else bob)


def test_so_is_a_loss_of_ones_own_at_the_first_labels_that_it_weighs():
    """Where all labels weigh the same, and where it is a mean over rows, there is nothing to share out."""
    step = {
        a: Batch(torch.arange(2), {"y": torch.tensor(y)}, (0, 0)) for a, y in (("alice0", [0, 1]), ("alice1", [1, 0]))
    }
    other = {**step, "alice1": Batch(torch.arange(2), {"y": torch.tensor([2, 2])}, (0, 0))}
    schedule = Schedule(("alice0", "alice1"), alice=Personal(), bob=MeanGradient(), turn="step")
    for loss in (Told(), Weighted()):
        assert [MeanLoss(loss, schedule, TWO).share(alice, step) for alice in step] == [1, 1]
    assert MeanLoss(Told(), schedule, TWO).share("alice0", other) == 1
    with pytest.raises(InputError, match=r"`loss` \(=Weighted\) weighs labels, so that all roles must"):
        MeanLoss(Weighted(), schedule, TWO).share("alice0", other)


class Heated(Own):
    """Cross-entropy with a temperature."""

    def __init__(self) -> None:
        super().__init__()
        self.log_t = nn.Parameter(torch.tensor(0.5))

    def forward(self, output: Tensor, labels: Tensor) -> Tensor:
        return super().forward(output * self.log_t.exp(), labels)


class Scale(Heated):
    def forward(self, x: Tensor) -> Tensor:
        return x * self.log_t.exp()


class Decayed(Own):
    """Cross-entropy, and the squares of a layer's weights."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, output: Tensor, labels: Tensor) -> Tensor:
        return super().forward(output, labels) + 0.1 * self.layer.weight.square().sum()


def test_a_loss_that_would_have_to_be_trained_is_refused():
    message = r"^`loss` \(=Heated\) has parameters to train, log_t, which no optimizer has: make them a block .* at bob"
    with pytest.raises(ValueError, match=message):
        learner(Heated())
    with pytest.raises(ValueError, match=r"\(=Decayed\) has parameters to train, layer.weight, layer.bias"):
        learner(Decayed(net().head))  # whose layer is not the network's


def trained(loss: nn.Module, model: nn.Sequential) -> tuple[dict[str, Tensor], list]:
    """By plain SGD of two roles, on one Alice's rows. Return the weights, and her mini-batches."""
    data = make_data()
    trained = SplitLearner(SplitNetwork(model, TWO, data), Schedule(data.takers), SGD, loss, 3)
    trainer = make_trainer(None, max_epochs=1)
    trainer.fit(trained, datamodule=data)
    return weights_of(trained.network), list(batches_of(data, 0))


@pytest.mark.parametrize("how", ["a block of the model", "frozen", "of the network's own"])
def test_what_else_a_loss_may_have_trains_as_in_plain_torch(how):
    model, plain = smooth(), smooth()
    loss, reference = {
        "a block of the model": lambda: (Own(), Heated()),
        "frozen": lambda: (Heated().requires_grad_(False), Heated().requires_grad_(False)),
        "of the network's own": lambda: (Decayed(model.head), Decayed(plain.head)),
    }[how]()
    if how == "a block of the model":
        model.head = nn.Sequential(model.head, Scale())
    found, batches = trained(loss, model)
    both = nn.ModuleList([plain, reference])
    optimizer = SGD(both.parameters())
    for x, y, _ in batches:
        both.zero_grad()
        reference(plain(x), y).backward()
        optimizer.step()
    assert all(map(torch.equal, found.values(), both.state_dict().values()))
    assert (reference.state_dict().get("log_t", 0.5) == 0.5) == (how != "a block of the model")


@pytest.mark.parametrize("told", [3, {"alice0": "x"}, {"alice0": [1.0, float("nan")]}, {"alice0": [True]}])
def test_sums_that_are_no_numbers_name_their_sender(told):
    wire = RemoteWire("bob")
    wire.parties = ["bob", "alice0"]
    wire.gather = lambda values: [values, told]
    with pytest.raises(FrameError, match=r"^alice0 sent .* (where sums by name are|where a number is) due"):
        wire.gather_by_alice({}, "alice")


def test_nobody_is_believed_but_who_holds_the_loss():
    """Alice tells Bob of a loss and an accuracy that no rows have had."""
    wire = RemoteWire("bob")
    wire.parties = ["bob", "alice0", "alice1"]
    wire.gather = lambda values: [
        values,
        {"alice0": [-794.9, 1, 1, 1], "alice1": [0, 0, 0, 9]},
        {"alice1": [1, 1, 1, 1]},
    ]
    assert wire.gather_by_alice({"alice0": [2.0, 4, 3, 4]}, "bob") == {"alice0": [2.0, 4, 3, 4]}
    told = wire.gather_by_alice({}, "alice")  # in a U each holds hers
    assert told == {"alice0": [-794.9, 1, 1, 1], "alice1": [1, 1, 1, 1]}


class Focal(nn.CrossEntropyLoss):
    """Derives from torch's, and divides by the rows whatever their weights."""

    def forward(self, output, labels):
        each = nn.functional.cross_entropy(output, labels, self.weight, reduction="none")
        return ((1 - (-each).exp()) * each).mean()


class Focused(Focal):
    def weight_of(self, labels):
        return len(labels)


def test_a_loss_that_derives_from_torchs_is_ones_own(tmp_path):
    weight = torch.tensor([1.0, 5.0, 0.2])
    data = make_data()
    with pytest.raises(ValueError, match=r"^`loss` \(=Focal\) must say what it divides by, since `micro_batches`"):
        learner_of(data, Focal(weight), micro_batches=2)
    whole, parts = (weights_behind(tmp_path, data, Focused(weight), micro_batches=n) for n in (1, 4))
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, msg=name)


class Noisy(nn.CrossEntropyLoss):
    def forward(self, output, labels):
        return super().forward(output + 0.3 * torch.randn_like(output), labels)

    def weight_of(self, labels):
        return len(labels)


class Counting(nn.CrossEntropyLoss):
    """Anneals by how often it was asked, which it keeps as an `attribute` or as a buffer."""

    def __init__(self, attribute: bool) -> None:
        super().__init__()
        self.attribute, self.count = attribute, 0
        self.register_buffer("counted", torch.zeros(()))

    def forward(self, output, labels):
        self.count, self.counted = self.count + 1, self.counted + 1
        return super().forward(output, labels) / (self.count if self.attribute else self.counted)


@pytest.mark.parametrize("loss", [Noisy(), Counting(attribute=False)], ids=["draws", "counts"])
def test_a_loss_that_draws_or_counts_goes_on_as_if_never_interrupted(loss, tmp_path):
    """And draws the same whatever is validated in between."""
    data = make_data(val_rows=6)
    whole = weights_behind(tmp_path, data, copy.deepcopy(loss), max_epochs=4)
    saver = ModelCheckpoint(tmp_path, "half")
    weights_behind(tmp_path, data, copy.deepcopy(loss), [saver], max_epochs=2)
    again = weights_behind(tmp_path, data, copy.deepcopy(loss), ckpt_path=tmp_path / "half.ckpt", max_epochs=4)
    rarely = weights_behind(tmp_path, data, copy.deepcopy(loss), max_epochs=4, check_val_every_n_epoch=4)
    assert all(torch.equal(again[name], value) for name, value in whole.items())
    if isinstance(loss, Noisy):
        assert all(torch.equal(rarely[name], value) for name, value in whole.items())


def test_a_loss_inside_of_which_a_part_counts_in_a_buffer_is_none_of_those():
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Counting(attribute=False)

        def forward(self, output, labels):
            return self.inner(output, labels)

    assert learner_of(make_data(), Outer()).loss.inner.counted == 0  # a copy was tried


def test_one_that_keeps_what_no_checkpoint_has_is_refused():
    with pytest.raises(ValueError, match=r"^`loss` \(=Counting\) makes different things of one output: it keeps"):
        learner_of(make_data(), Counting(attribute=True))


def learner_of(data, loss, micro_batches=1):
    network = SplitNetwork(smooth(), TWO_PARTY, data, seed=SEED)
    return SplitLearner(network, Schedule(tuple(data.shards)), SGD, loss, 3, micro_batches=micro_batches)


def weights_behind(folder, data, loss, callbacks=(), ckpt_path=None, micro_batches=1, **trainer):
    learner = learner_of(data, loss, micro_batches)
    make_trainer(folder, callbacks, **trainer).fit(learner, datamodule=data, ckpt_path=ckpt_path)
    return {name: value.clone() for name, value in learner.state_dict().items()}
