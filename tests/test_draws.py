"""A data set's own random numbers: drawn anew in every epoch, as a DataLoader's, and the same in every run."""

import random
from functools import partial

import numpy as np
import pytest
import torch
from helpers import SEED, make_rows
from pytorch_lightning.callbacks import ModelCheckpoint
from runs import difference, end_state, make_learner, make_trainer
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.utils import save_image

from splitlearn.data import Source, SplitData
from splitlearn.data.alike import look
from splitlearn.data.draws import EVALUATION, draw
from splitlearn.data.rows import InMemory, Streamed
from splitlearn.data.sources import datasets
from splitlearn.errors import InputError
from splitlearn.seeds import derive

ROWS = 20


def of_torch(seed=None):
    generator = torch.default_generator if seed is None else torch.Generator().manual_seed(seed)
    return torch.rand(1, 4, 6, generator=generator)


def of_numpy(seed=None):
    draws = np.random.random if seed is None else np.random.RandomState(seed % 2**32).random_sample
    return torch.from_numpy(draws((1, 4, 6))).float()


def of_python(seed=None):
    return torch.full((1, 4, 6), (random if seed is None else random.Random(seed)).random())


class Noisy(Dataset):
    """An augmentation of the data set's own: what is drawn is added to the row."""

    def __init__(self, noise=of_torch, num_rows=ROWS):
        self.x, self.y = make_rows(num_rows)
        self.noise = noise

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i] + self.noise(), int(self.y[i])


class Plain(Noisy):
    """The same by hand: what row i draws in one pass over the rows."""

    def __init__(self, number, noise=of_torch):
        super().__init__(noise)
        self.number = number

    def __getitem__(self, i):
        return self.x[i] + self.noise(derive(SEED, "rows", self.number, i)), int(self.y[i])


def make_data(dataset, test=None, **settings):
    return SplitData(Source(dataset, test, 3), batch_size=4, seed=SEED, **settings)


def train(data, folder, epochs=2, local_epochs=1, ckpt=None, **trainer):
    """Return the learner, the trainer and the rows of each mini-batch as they were trained on."""
    seen = []

    def keep(x, generator):
        seen.append(x)
        return x

    data.augment = keep
    learner = make_learner(data, schedule={"local_epochs": local_epochs})
    lightning = make_trainer(folder, max_epochs=epochs, **trainer)
    lightning.fit(learner, datamodule=data, ckpt_path=ckpt)
    return learner, lightning, seen


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("noise", [of_torch, of_numpy, of_python])
def test_each_epoch_draws_anew_and_as_a_data_loader_does_by_hand(tmp_path, noise, num_workers):
    data = make_data(Noisy(noise), num_workers=num_workers)
    _, trainer, seen = train(data, tmp_path)
    expected = []
    for epoch in range(2):
        order = [ids.tolist() for step in trainer.train_dataloader.steps(epoch) for ids in step.batches.values()]
        expected += [x for x, _ in DataLoader(Plain(epoch, noise), batch_sampler=order)]
    assert difference(seen, expected) == []
    assert isinstance(data.rows, Streamed)
    first, second = (Plain(epoch, noise)[0][0] for epoch in range(2))
    assert not torch.equal(first, second)


def test_each_pass_over_the_rows_in_an_epoch_draws_anew(tmp_path):
    data = make_data(Noisy())
    _, trainer, seen = train(data, tmp_path, local_epochs=2)
    order = [ids.tolist() for step in trainer.train_dataloader.steps(1) for ids in step.batches.values()]
    half = len(order) // 2
    passes = [DataLoader(Plain(2 + i), batch_sampler=order[i * half :][:half]) for i in range(2)]
    assert difference(seen[2 * half :], [x for loader in passes for x, _ in loader]) == []


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_run_that_is_gone_on_from_in_mid_epoch_draws_what_an_uninterrupted_one_does(tmp_path, num_workers):
    def run(folder, **settings):
        torch.rand(len(folder))  # whatever else is drawn
        data = make_data(Noisy(), num_workers=num_workers)
        saves = ModelCheckpoint(tmp_path / folder, save_last=True, every_n_train_steps=3)
        return train(data, tmp_path / folder, callbacks=[saves], **settings)

    learner, trainer, seen = run("whole")
    _, _, before = run("first", max_steps=6, epochs=None)
    again, resumed, after = run("second", ckpt=tmp_path / "first" / "last.ckpt")
    assert difference(seen, before + after) == []
    assert difference(end_state(learner, trainer), end_state(again, resumed)) == []


def test_each_evaluation_draws_the_same(tmp_path):
    """Of the rows held out of the training rows, streamed, and of test rows, which are held in memory."""
    data = make_data(Noisy(), Noisy(), val_fraction=0.3)
    assert isinstance(data.rows, Streamed)
    assert isinstance(data.test_rows, InMemory)
    expected = Plain(EVALUATION)
    for _ in range(2):
        torch.rand(1)
        (fields,) = data.rows.stream([data.val_ids], torch.device("cpu"))
        assert torch.equal(fields["x"], torch.stack([expected[i][0] for i in data.val_ids.tolist()]))
    assert torch.equal(data.test_rows.fields["x"], torch.stack([expected[i][0] for i in range(ROWS)]))


def test_rows_that_draw_are_held_in_memory_with_a_warning_if_asked_for(tmp_path, recwarn):
    with pytest.warns(UserWarning, match=r"^`data.in_memory` \(=True\) reads each row of Noisy once, and the random"):
        held = make_data(Noisy(), in_memory=True)
    assert torch.equal(held.rows.fields["x"], torch.stack([Plain(EVALUATION)[i][0] for i in range(ROWS)]))
    recwarn.clear()
    for quiet in (make_data(Noisy()), make_data(Noisy(), in_memory=False), make_data(Noisy(), Noisy())):
        assert isinstance(quiet.rows, Streamed)
    assert [str(warning.message) for warning in recwarn] == []


def test_a_checkpoint_knows_whether_what_is_drawn_stays_the_same(tmp_path):
    train(make_data(Noisy()), tmp_path, callbacks=[ModelCheckpoint(tmp_path, save_last=True)])
    with pytest.warns(UserWarning, match="data.in_memory"):
        held = make_data(Noisy(), in_memory=True)
    with pytest.raises(InputError, match=r"`data.in_memory` is False in the checkpoint and True here"):
        train(held, tmp_path, epochs=3, ckpt=tmp_path / "last.ckpt")


class Rarely(Noisy):
    """Draws, and so rarely changes a row that none of those that are read at the start shows it."""

    def __getitem__(self, i):
        return self.x[i] + (self.noise().flatten()[0] < 1e-9), int(self.y[i])


@pytest.mark.parametrize("noise", [of_torch, of_numpy, of_python])
def test_rows_that_seldom_change_are_known_by_their_draws(noise):
    assert all(torch.equal(Rarely(noise)[i][0], Rarely(noise).x[i]) for i in range(ROWS))
    assert isinstance(make_data(Rarely(noise)).rows, Streamed)
    assert isinstance(make_data(Noisy(partial(torch.zeros, 1, 4, 6))).rows, InMemory)  # which draws nothing


def test_a_generator_of_its_own_is_warned_of(recwarn):
    generator = torch.Generator()
    with pytest.warns(UserWarning, match=r"^Noisy draws random numbers from a generator of its own, which a resumed"):
        data = make_data(Noisy(partial(torch.rand, 1, 4, 6, generator=generator)))
    assert isinstance(data.rows, Streamed)


def test_to_look_at_rows_leaves_the_global_generators_where_they_were():
    def after(act):
        torch.manual_seed(1)
        np.random.seed(1)
        random.seed(1)
        act()
        return draw()

    for noise in (of_torch, of_numpy, of_python):
        assert after(lambda noise=noise: look(Noisy(noise))) == after(lambda: None) != after(noise)


def test_a_folder_of_pictures_with_a_random_transform_is_streamed(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for i in range(4):
            save_image(torch.rand(3, 4, 4), tmp_path / name / f"{i}.png")
    flips = [transforms.RandomHorizontalFlip()]
    for steps, kind in (([], InMemory), (flips, Streamed)):
        folder = ImageFolder(str(tmp_path), transforms.Compose([*steps, transforms.PILToTensor()]))
        assert isinstance(SplitData(datasets(folder), val_fraction=0.0).rows, kind)
