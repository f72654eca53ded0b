"""Where pictures and labels come from: each function here returns one `Source`.

What fits in memory comes as a `TensorDataset`, folders of pictures stay on disk. N samples, C channels, H, W pixels.
"""

import math
import operator
import os
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, TensorDataset
from torchvision import transforms
from torchvision.datasets import CIFAR10, CIFAR100, MNIST, FashionMNIST, ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.datasets.utils import check_integrity

from splitlearn.data.checked import naming_row
from splitlearn.data.labels import in_order, require_one_spelling, warn_of_case
from splitlearn.errors import InputError

Torchvision = type[MNIST] | type[CIFAR10]
ELSEWHERE = "name a folder that has them in data.root or SPLITLEARN_DATA, or take data=digits, which needs no files"
SYSTEM = {"__MACOSX", "System Volume Information", "$RECYCLE.BIN", "@eaDir", "lost+found", "Thumbs.db"}
FEW = 20  # rows or classes among which all may well be different
AGAIN = "delete it and fetch it again with data.download=true"


class Source(NamedTuple):
    """Map-style data sets of items (x, label): x a tensor [C, H, W], uint8 pixels or floats; label in 0..num_classes-1.

    `test` is None where the source has no test set of its own: the caller splits one off `train`. `columns` names the
    last dimension of x where its values have names, `classes` the labels, in their order, where they have some.
    """

    train: Dataset
    test: Dataset | None
    num_classes: int
    columns: Sequence[str] | None = None
    classes: Sequence[str] | None = None


def digits() -> Source:
    """The 1,797 real 8x8 digits that come with scikit-learn: float32 [N, 1, 8, 8] in 0..1, no test set, no files."""
    from sklearn.datasets import load_digits  # two seconds of import that no other source should pay

    bunch = load_digits()
    x = torch.as_tensor(bunch.images, dtype=torch.float32).unsqueeze(1) / 16
    return Source(TensorDataset(x, torch.as_tensor(bunch.target, dtype=torch.int64)), None, 10)


def mnist(root: str | Path, download: bool = False) -> Source:
    """MNIST in `root`/MNIST/raw: uint8 [N, 1, 28, 28]. FileNotFoundError if it is not there, ValueError if damaged."""
    return _idx(MNIST, root, download)


def fashion_mnist(root: str | Path, download: bool = False) -> Source:
    """Fashion-MNIST in `root`/FashionMNIST/raw: uint8 [N, 1, 28, 28]. Raises as `mnist` does."""
    return _idx(FashionMNIST, root, download)


def cifar10(root: str | Path, download: bool = False) -> Source:
    """CIFAR-10 in `root`/cifar-10-batches-py: uint8 [N, 3, 32, 32]. Raises as `mnist` does."""
    return _cifar(CIFAR10, root, download)


def cifar100(root: str | Path, download: bool = False) -> Source:
    """CIFAR-100 in `root`/cifar-100-python: uint8 [N, 3, 32, 32]. Raises as `mnist` does."""
    return _cifar(CIFAR100, root, download)


class Pictures(ImageFolder):
    """An ImageFolder without hidden folders and those that operating systems leave, and 2 before 10."""

    def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
        classes = _class_folders(Path(directory))
        return classes, {name: i for i, name in enumerate(classes)}


def image_folder(root: str | Path, image_size: int | None = None) -> Source:
    """Pictures in class folders, `root`/CLASS/* or `root`/train/CLASS/* with `root`/test/CLASS/*: uint8 [3, H, W].

    With `image_size` (pixels) each picture is resized, shorter side first, and cropped around its centre to a square;
    without, all must be of one size, which their headers tell. Pictures are decoded when read, and an unreadable one
    raises ValueError with its name. Folders beside train and test are not read.
    """
    root = Path(root).expanduser().absolute()
    if image_size is not None and image_size < 1:
        raise ValueError(f"`data.image_size` (={image_size}) must be at least 1 pixel, or null to keep pictures' own")
    if not root.is_dir():
        raise FileNotFoundError(f"`data.root` (={root}) is not a folder: name the one that holds the class folders")
    # Without class folders in it train may be a class itself, beside bus and car.
    split = (root / "train").is_dir() and bool(_class_folders(root / "train"))
    train = _pictures(root / "train" if split else root, image_size)
    test = _pictures(root / "test", image_size) if split and (root / "test").is_dir() else None
    if split and test is None and (root / "val").is_dir():
        raise ValueError(f"{root} has train and val but no test: rename val to test, or move it away")
    if test and test.classes != train.classes:
        folders = dict.fromkeys(test.classes, test.root) | dict.fromkeys(train.classes, train.root)
        require_one_spelling(folders, "class folder")
        ours, theirs = set(train.classes), set(test.classes)
        odd = f"only train has {sorted(ours - theirs)}, only test has {sorted(theirs - ours)}"
        raise ValueError(f"train and test in {root} must have the same class folders, but {odd}: add those folders")
    if image_size is None:
        _require_one_size([path for path, _ in train.samples + (test.samples if test else [])])
    return Source(train, test, len(train.classes), classes=train.classes)


def datasets(train: Dataset, test: Dataset | None = None, num_classes: int | None = None) -> Source:
    """A user's own map-style data sets of items (tensor x, integer label).

    `num_classes` is the length of `train.classes`, or else follows from the largest of `train.targets`; where there is
    neither, it must be given. ValueError for a data set that is iterable-style, empty, or of other items.
    """
    for name, part in (("train", train), *([("test", test)] if test is not None else [])):
        _require_samples(name, part)
    num_classes = _count_classes(train) if num_classes is None else num_classes
    if num_classes < 2:
        raise ValueError(f"`num_classes` (={num_classes}) must be at least 2: there is nothing to learn from one class")
    return Source(train, test, num_classes)


def _idx(dataset: type[MNIST], root: str | Path, download: bool) -> Source:
    root = Path(root).expanduser().absolute()
    folder = root / dataset.__name__ / "raw"
    _require(dataset, root, folder, [name.removesuffix(".gz") for name, _ in dataset.resources], download)
    for part in ("train", "t10k"):  # torchvision would read past a damaged file, or stop far from its name
        images, labels = folder / f"{part}-images-idx3-ubyte", folder / f"{part}-labels-idx1-ubyte"
        num_images, num_labels = _idx_shape(images, dims=3)[0], _idx_shape(labels, dims=1)[0]
        if num_images != num_labels or num_images < 1:
            held = f"{images} holds {num_images} images and {labels} {num_labels} labels"
            raise ValueError(f"{held}: there must be one label for each image; if a file is another's, {AGAIN}")
    return _in_memory(dataset, root)


def _idx_shape(path: Path, dims: int) -> tuple[int, ...]:
    """The shape in the header of an IDX file of bytes; ValueError where the file's size is not what the header says."""
    size, length = path.stat().st_size, 4 + 4 * dims
    with path.open("rb") as file:
        header = file.read(length)
    magic = bytes((0, 0, 8, dims))  # 8: unsigned bytes
    if len(header) < length or header[:4] != magic:
        rule = f"an IDX file starts with {magic.hex(' ')} and {dims} lengths, {length} bytes in all"
        raise ValueError(f"{path} has {size} bytes and starts with '{header[:4].hex(' ')}', but {rule}: {AGAIN}")
    shape = struct.unpack(f">{dims}I", header[4:])
    promised = length + math.prod(shape)
    if size != promised:
        raise ValueError(f"{path} has {size} bytes, but its header promises {promised}: {AGAIN}")
    return shape


def _cifar(dataset: type[CIFAR10], root: str | Path, download: bool) -> Source:
    root = Path(root).expanduser().absolute()
    folder = root / dataset.base_folder
    md5 = dict([*dataset.train_list, *dataset.test_list, (dataset.meta["filename"], dataset.meta["md5"])])
    _require(dataset, root, folder, list(md5), download)
    try:
        return _in_memory(dataset, root)
    except RuntimeError:
        bad = ", ".join(name for name in md5 if not check_integrity(folder / name, md5[name]))
        raise ValueError(f"{folder} is damaged, the md5 of {bad} is not the published one: {AGAIN}") from None


def _in_memory(dataset: Torchvision, root: Path) -> Source:
    train, test = dataset(root, train=True), dataset(root, train=False)
    return Source(_tensors(train), _tensors(test), len(train.classes))


def _tensors(part: MNIST | CIFAR10) -> TensorDataset:
    x = torch.as_tensor(part.data)
    x = x.unsqueeze(1) if x.ndim == 3 else x.permute(0, 3, 1, 2).contiguous()  # from [N, H, W] or [N, H, W, C]
    return TensorDataset(x, torch.as_tensor(part.targets))


def _require(dataset: Torchvision, root: Path, folder: Path, files: Sequence[str], download: bool) -> None:
    """See that `folder`, somewhere below `root`, has all `files`; FileNotFoundError where it has not."""
    missing = [name for name in files if not (folder / name).is_file()]
    if not missing:
        return
    lack = f"{dataset.__name__} is not in {folder}, which lacks {', '.join(missing)}"
    if not download:
        raise FileNotFoundError(f"{lack}: fetch the files with data.download=true, {ELSEWHERE}")
    try:
        _download(dataset, root, folder, files)
    except (OSError, RuntimeError, HTTPException) as error:
        raise FileNotFoundError(f"{lack}, and its download failed ({error}): put them there, {ELSEWHERE}") from None


def _download(dataset: Torchvision, root: Path, folder: Path, files: Sequence[str]) -> None:
    # Staged, so that a failed download leaves nothing behind and parties that download at once do not meet. Staged in
    # the nearest folder that exists, so that moving a file into place is one atomic rename on the same disk.
    nearest = next(place for place in (root, *root.parents) if place.is_dir())
    with TemporaryDirectory(prefix=".download-", dir=nearest) as staging:
        dataset(staging, download=True)
        folder.mkdir(parents=True, exist_ok=True)
        for name in files:
            os.replace(staging / folder.relative_to(root) / name, folder / name)


def _pictures(folder: Path, image_size: int | None) -> ImageFolder:
    classes = _class_folders(folder)
    if len(classes) < 2:
        raise ValueError(f"{folder} must hold two class folders or more, not {classes}: give each class a folder")
    for name in classes:  # torchvision would look deeper, and take training/cat/1.png for a picture of a training
        if not any(is_picture(file, folder / name) for file in (folder / name).iterdir()):
            rule = f"each folder in {folder} is a class and must hold pictures ({', '.join(IMG_EXTENSIONS)}) itself"
            raise ValueError(f"{folder / name} holds none: {rule}; fill it or move it away")
    require_one_spelling(dict.fromkeys(classes, str(folder)), "class folder")
    warn_of_case(dict.fromkeys(classes, str(folder)), "class folder")
    pictures = Pictures(
        str(folder), to_tensor(image_size), loader=_read_rgb, is_valid_file=lambda path: is_picture(Path(path), folder)
    )
    if empty := [path for path, _ in pictures.samples if not os.path.getsize(path)]:  # as a broken copy leaves it
        raise ValueError(f"{empty[0]} cannot be read as a picture (it has no bytes): replace or remove it")
    return pictures


def to_tensor(image_size: int | None) -> transforms.Compose:
    """From a picture to uint8 [C, H, W], scaled and cropped to a square of `image_size` pixels unless that is None."""
    steps = [] if image_size is None else [transforms.Resize(image_size), transforms.CenterCrop(image_size)]
    return transforms.Compose([*steps, transforms.PILToTensor()])


def _class_folders(folder: Path) -> list[str]:
    return in_order(entry.name for entry in folder.iterdir() if entry.is_dir() and not _is_hidden(entry.name))


def is_picture(path: Path, folder: Path) -> bool:
    return path.suffix.lower() in IMG_EXTENSIONS and not any(map(_is_hidden, path.relative_to(folder).parts))


def _is_hidden(name: str) -> bool:
    """Whether a user does not see it, or an operating system left it: `.ipynb_checkpoints`, `._cat.png`, `@eaDir`."""
    return name.startswith(".") or name in SYSTEM


def _require_one_size(paths: Sequence[str]) -> None:
    first: dict[tuple[int, int], str] = {}  # the first picture of each size, (W, H) pixels
    for path in paths:
        with opened(path) as image:
            first.setdefault(image.size, path)
    if len(first) > 1:
        unlike = " and ".join(f"{path} is {w}x{h}" for (w, h), path in list(first.items())[:2])
        raise ValueError(f"pictures must be of one size, but {unlike} pixels: resize them with data.image_size=...")


@contextmanager
def opened(path: str) -> Iterator[Image.Image]:
    """The picture at `path`, header read and pixels not; ValueError with its name for whatever goes wrong inside."""
    try:
        with Image.open(path) as image:
            if image.mode[0] in "IF":  # Pillow would clip 16 bits and floats to 255, not scale them
                raise ValueError(f"mode {image.mode} has more than 8 bits")
            yield image
    except Exception as error:  # damaged files raise OSError, SyntaxError, struct.error and more, as the format likes
        raise InputError(f"{path} cannot be read as 8-bit pixels ({error}): replace or remove it") from error


def _read_rgb(path: str) -> Image.Image:
    with opened(path) as image:
        return image.convert("RGB")


def _require_samples(name: str, dataset: Any) -> None:
    kind = f"`{name}` (={type(dataset).__name__})"
    if isinstance(dataset, IterableDataset) or not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
        raise ValueError(f"{kind} must have __getitem__ and __len__: read a stream into a TensorDataset first")
    if len(dataset) < 1:
        raise ValueError(f"{kind} has {len(dataset)} samples: it must have at least one")
    with naming_row(0, f"{name} rows"):
        item = dataset[0]
    try:
        x, label = item
        operator.index(label)
    except (TypeError, ValueError):
        raise ValueError(f"{kind} must have items (tensor, int label): wrap it in a data set that has") from None
    if isinstance(x, (tuple, list, dict)):
        raise ValueError(
            f"{kind} gives x as {type(x).__name__}, not as one tensor: join its parts, with torch.cat, say"
        )
    if not isinstance(x, Tensor):
        raise ValueError(f"{kind} gives x as {type(x).__name__}, not as a tensor: give it transform=PILToTensor(), say")


def too_many(num_values: int, num_rows: int) -> bool:
    """Whether so many different labels in so many rows are measurements or names, and no classes."""
    return num_values > FEW and 2 * num_values > num_rows


def _count_classes(dataset: Any) -> int:
    if hasattr(dataset, "classes"):
        return len(dataset.classes)
    if hasattr(dataset, "targets"):
        targets = torch.as_tensor(dataset.targets)
        if too_many(len(targets.unique()), len(targets)):
            rule = f"{len(targets.unique())} different values in {len(targets)} rows, which are no classes"
            raise ValueError(f"`train.targets` hold {rule}: sort them into classes, or give num_classes")
        return int(targets.max()) + 1
    raise ValueError(f"`train` (={type(dataset).__name__}) has no .classes and no .targets to count: give num_classes")
