"""The loops that splitlearn is measured against: generators that train one mini-batch per `next`, for ever."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.datasets import MNIST

BATCH_SIZE, LR = 64, 0.03


def images() -> tuple[Tensor, Tensor]:
    """MNIST's 60,000 training images [N, 28, 28] uint8 and labels [N], or random ones where it is not at hand."""
    root = Path(os.environ.get("SPLITLEARN_DATA", "data"))
    if (root / "MNIST" / "raw").is_dir():
        mnist = MNIST(root)
        return mnist.data, mnist.targets
    print(f"no MNIST in {root.absolute()}: random images of the same shape")
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(256, (60_000, 28, 28), dtype=torch.uint8, generator=generator)
    return x, torch.randint(10, (60_000,), generator=generator)


def by_hand() -> Iterator[None]:
    """The unsplit network over tensors in memory, as one would write it down."""
    x, y = images()
    x = x.flatten(1).float().div_(255).sub_(0.5).div_(0.5)
    model = nn.Sequential(*bottom(), *top())
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    loss_function = nn.NLLLoss()
    while True:
        running_loss = 0.0
        for rows in torch.randperm(len(x)).split(BATCH_SIZE):
            optimizer.zero_grad()
            loss = loss_function(model(x[rows]), y[rows])
            loss.backward()
            optimizer.step()
            running_loss += loss.item()
            yield


def the_tutorials_way() -> Iterator[None]:
    """PySyft's "Introduction to SplitNN" without PySyft: a DataLoader with transforms per sample, and a plain loop."""
    to_tensor = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.5,), (0.5,))])
    loader = DataLoader(Pictures(*images(), to_tensor), batch_size=BATCH_SIZE, shuffle=True)
    models = [nn.Sequential(*bottom()), nn.Sequential(*top())]
    optimizers = [torch.optim.SGD(model.parameters(), lr=LR) for model in models]
    loss_function = nn.NLLLoss()
    while True:
        running_loss = 0.0
        for x, y in loader:
            for optimizer in optimizers:
                optimizer.zero_grad()
            sent = models[0](x.view(x.shape[0], -1))
            received = sent.detach().requires_grad_()
            loss = loss_function(models[1](received), y)
            loss.backward()
            sent.backward(received.grad)
            for optimizer in optimizers:
                optimizer.step()
            running_loss += loss.item()
            yield


class Pictures(Dataset):
    """What torchvision's MNIST does with a sample: a tensor to a PIL image, and through the transforms."""

    def __init__(self, x: Tensor, y: Tensor, transform: transforms.Compose) -> None:
        self.x, self.y, self.transform = x, y, transform

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.x[index].numpy())), int(self.y[index])


def bottom() -> list[nn.Module]:
    return [nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 640), nn.ReLU()]


def top() -> list[nn.Module]:
    return [nn.Linear(640, 10), nn.LogSoftmax(dim=1)]
