"""Every source, from files of a few pictures made here; every refusal by name, value and cure."""

import gzip
import hashlib
import pickle
import re
import struct
from pathlib import Path
from urllib.request import urlretrieve

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import IterableDataset, TensorDataset
from torchvision.datasets import CIFAR10, CIFAR100, MNIST

from splitlearn.data import Source, SplitData
from splitlearn.data.rows import Normalise, Streamed, load
from splitlearn.data.sources import cifar10, cifar100, datasets, digits, fashion_mnist, image_folder, mnist
from splitlearn.errors import InputError
from splitlearn.train import train

CPU = torch.device("cpu")
IDX = ["train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"]


def refuses(error: type[Exception], *parts: object):
    """A context that expects `error`, with `parts` in its message in this order."""
    return pytest.raises(error, match="(?s)" + ".*".join(re.escape(str(part)) for part in parts))


def write_idx(folder: Path) -> dict[str, np.ndarray]:
    """20 training and 10 test pictures; returns what each file holds."""
    folder.mkdir(parents=True)
    rng, arrays = np.random.default_rng(0), {}
    for part, n in (("train", 20), ("t10k", 10)):
        arrays[f"{part}-images-idx3-ubyte"] = rng.integers(256, size=(n, 28, 28), dtype=np.uint8)
        arrays[f"{part}-labels-idx1-ubyte"] = rng.integers(10, size=n, dtype=np.uint8)
    for name, array in arrays.items():
        header = struct.pack(f">{1 + array.ndim}I", 2048 + array.ndim, *array.shape)
        (folder / name).write_bytes(header + array.tobytes())
    return arrays


def write_cifar(dataset, root: Path, labels: str, monkeypatch) -> dict[str, np.ndarray]:
    """2 pictures a file, and their checksums in place of the published ones; returns the pixels [2, 3, 32, 32]."""
    folder, rng, pixels = root / dataset.base_folder, np.random.default_rng(0), {}
    folder.mkdir(parents=True)

    def write(name: str, content: dict) -> tuple[str, str]:
        (folder / name).write_bytes(pickle.dumps(content))
        return name, hashlib.md5((folder / name).read_bytes()).hexdigest()

    for files in ("train_list", "test_list"):
        names = [name for name, _ in getattr(dataset, files)]
        pixels.update({name: rng.integers(256, size=(2, 3, 32, 32), dtype=np.uint8) for name in names})
        entries = [write(name, {"data": pixels[name].reshape(2, -1), labels: [1, 2]}) for name in names]
        monkeypatch.setattr(dataset, files, entries)
    _, md5 = write(dataset.meta["filename"], {dataset.meta["key"]: list("abc")})
    monkeypatch.setattr(dataset, "meta", {**dataset.meta, "md5": md5})
    return pixels


def write_classes(root: Path, *folders: str) -> Path:
    """Two pictures in each folder, 4x6 pixels, as dark as the folder comes early."""
    for shade, folder in enumerate(folders):
        (root / folder).mkdir(parents=True)
        for name in ("a.png", "b.png"):
            Image.new("L", (4, 6), shade).save(root / folder / name)
    return root


def test_digits():
    train, test, num_classes, *_ = digits()
    x, y = train.tensors
    assert (x.shape, x.dtype, y.dtype) == ((1797, 1, 8, 8), torch.float32, torch.int64)
    assert (x.min(), x.max(), sorted(set(y.tolist()))) == (0, 1, list(range(10)))
    assert torch.equal(x * 16, (x * 16).round())
    assert (test, num_classes) == (None, 10)


@pytest.mark.parametrize(("source", "name"), [(mnist, "MNIST"), (fashion_mnist, "FashionMNIST")])
def test_idx_files_come_as_they_are(tmp_path, source, name):
    arrays = write_idx(tmp_path / name / "raw")
    train, test, num_classes, *_ = source(str(tmp_path))
    for part, prefix in ((train, "train"), (test, "t10k")):
        x, y = part.tensors
        assert (x.dtype, y.dtype) == (torch.uint8, torch.int64)
        assert np.array_equal(x[:, 0].numpy(), arrays[f"{prefix}-images-idx3-ubyte"])
        assert np.array_equal(y.numpy(), arrays[f"{prefix}-labels-idx1-ubyte"])
    assert (train.tensors[0].shape, num_classes) == ((20, 1, 28, 28), 10)


@pytest.mark.parametrize(
    ("source", "dataset", "labels", "n"), [(cifar10, CIFAR10, "labels", 10), (cifar100, CIFAR100, "fine_labels", 2)]
)
def test_cifar_comes_channels_first(tmp_path, monkeypatch, source, dataset, labels, n):
    pixels = write_cifar(dataset, tmp_path, labels, monkeypatch)
    result = source(tmp_path)
    (x, y), (x_test, _) = result.train.tensors, result.test.tensors
    assert (x.shape, x.dtype, y.dtype, len(x_test)) == ((n, 3, 32, 32), torch.uint8, torch.int64, 2)
    assert x.is_contiguous()
    assert np.array_equal(x[:2].numpy(), pixels[dataset.train_list[0][0]])
    assert np.array_equal(x_test.numpy(), pixels[dataset.test_list[0][0]])
    assert (y[:2].tolist(), result.num_classes) == ([1, 2], 3)  # as many as the names in its meta file


@pytest.mark.parametrize(
    ("source", "name", "below", "files"),
    [
        (mnist, "MNIST", "MNIST/raw", IDX),
        (fashion_mnist, "FashionMNIST", "FashionMNIST/raw", IDX),
        (cifar10, "CIFAR10", "cifar-10-batches-py", ["data_batch_1", "test_batch", "batches.meta"]),
        (cifar100, "CIFAR100", "cifar-100-python", ["train", "test", "meta"]),
    ],
)
def test_missing_files_are_named_with_three_cures(tmp_path, monkeypatch, source, name, below, files):
    monkeypatch.chdir(tmp_path)
    cures = ["data.download=true", "data.root", "SPLITLEARN_DATA", "data=digits", "needs no files"]
    with refuses(FileNotFoundError, f"{name} is not in {tmp_path / 'absent' / below}", *files, *cures):
        source("absent")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def mirror(tmp_path, monkeypatch) -> Path:
    """A mirror of MNIST on disk: 20 and 10 pictures, packed."""
    folder = tmp_path / "mirror"
    write_idx(folder)
    resources = []
    for name in IDX:
        packed = gzip.compress((folder / name).read_bytes())
        (folder / f"{name}.gz").write_bytes(packed)
        resources.append((f"{name}.gz", hashlib.md5(packed).hexdigest()))
    monkeypatch.setattr(MNIST, "resources", resources)
    monkeypatch.setattr(MNIST, "mirrors", [f"{folder.as_uri()}/"])
    monkeypatch.setattr("torchvision.datasets.utils._urlretrieve", urlretrieve)  # torchvision's own knows http only
    return folder


def test_download_fills_the_folder_once(tmp_path, mirror):
    root = tmp_path / "new/data"
    first = mnist(root, download=True)
    assert len(first.train) == 20
    assert sorted(path.name for path in root.rglob("*")) == sorted(["MNIST", "raw", *IDX])
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["data"]
    for packed in mirror.iterdir():
        packed.unlink()
    assert torch.equal(mnist(root, download=True).train.tensors[0], first.train.tensors[0])


def test_a_failed_download_leaves_nothing_behind(tmp_path, mirror):
    (mirror / f"{IDX[2]}.gz").write_bytes(b"half a file")
    root = tmp_path / "new/data"
    said = [f"MNIST is not in {root / 'MNIST/raw'}", "its download failed", IDX[2], "SPLITLEARN_DATA", "data=digits"]
    with refuses(FileNotFoundError, *said):
        mnist(root, download=True)
    assert [path.name for path in tmp_path.iterdir()] == ["mirror"]


def test_a_truncated_idx_file_is_named_with_both_sizes(tmp_path):
    write_idx(tmp_path / "MNIST/raw")
    path = tmp_path / "MNIST/raw" / IDX[0]
    path.write_bytes(path.read_bytes()[:-5])
    said = [path, f"has {20 * 784 + 11} bytes", f"promises {20 * 784 + 16}", "delete it", "data.download=true"]
    with refuses(ValueError, *said):
        mnist(tmp_path)


@pytest.mark.parametrize(
    ("content", "start"), [(b"<html>" * 9, "3c 68 74 6d"), (b"", ""), (b"\0\0\x08\x01\0", "00 00 08 01")]
)
def test_a_file_that_is_not_idx_is_named(tmp_path, content, start):
    write_idx(tmp_path / "MNIST/raw")
    path = tmp_path / "MNIST/raw" / IDX[3]
    path.write_bytes(content)
    rule = "an IDX file starts with 00 00 08 01 and 1 lengths, 8 bytes in all"
    with refuses(ValueError, path, f"has {len(content)} bytes and starts with '{start}'", rule, "delete it"):
        mnist(tmp_path)


def test_more_images_than_labels_names_both_files(tmp_path):
    raw = tmp_path / "MNIST/raw"
    write_idx(raw)
    (raw / IDX[1]).write_bytes((raw / IDX[3]).read_bytes())
    said = [f"{raw / IDX[0]} holds 20 images", f"{raw / IDX[1]} 10 labels", "one label for each image", "download=true"]
    with refuses(ValueError, *said):
        mnist(tmp_path)


@pytest.mark.parametrize("name", ["data_batch_3", "batches.meta"])
def test_damaged_cifar_names_folder_and_file(tmp_path, monkeypatch, name):
    write_cifar(CIFAR10, tmp_path, "labels", monkeypatch)
    folder = tmp_path / CIFAR10.base_folder
    (folder / name).write_bytes(b"not the published one")
    with refuses(ValueError, f"{folder} is damaged, the md5 of {name} is not", "delete it", "data.download=true"):
        cifar10(tmp_path)


def test_train_and_test_folders(tmp_path):
    write_classes(tmp_path, "train/dog", "train/cat", "test/dog", "test/cat")
    train, test, num_classes, *_ = image_folder(tmp_path)
    assert (len(train), len(test), num_classes) == (4, 4, 2)
    x, label = train[3]
    assert (x.shape, x.dtype, label) == ((3, 6, 4), torch.uint8, 1)
    assert x.unique().tolist() == [0]  # dog, written first and sorted last


@pytest.mark.parametrize("folders", [["bus", "car", "train"], ["train/bus", "train/car", "train/train"]])
def test_without_a_test_folder_test_is_none(tmp_path, folders):
    source = image_folder(write_classes(tmp_path, *folders))
    assert (source.test, source.num_classes, len(source.train)) == (None, 3, 6)


def test_folders_called_by_numbers_are_classes_in_their_order(tmp_path):
    train = image_folder(write_classes(tmp_path, *map(str, range(12)))).train
    assert sorted((int(x.unique()), label) for x, label in train)[::2] == [(i, i) for i in range(12)]


def test_one_class_in_folders_of_two_spellings_is_refused(tmp_path):
    write_classes(tmp_path / "a", "7", "07", "none")
    said = f"{tmp_path}/a: class folder `7` is `07` of {tmp_path}/a in another spelling: write them alike"
    with refuses(ValueError, said):
        image_folder(tmp_path / "a")
    write_classes(tmp_path / "b", "train/caf\u00e9", "train/none", "test/cafe\u0301", "test/none")
    said = f"{tmp_path}/b/train: class folder `caf\\xe9` is `cafe\\u0301` of {tmp_path}/b/test in another spelling"
    with refuses(ValueError, said):
        image_folder(tmp_path / "b")
    with pytest.warns(UserWarning, match="class folder `dog` differs from `Dog` of .* in upper and lower case alone"):
        assert image_folder(write_classes(tmp_path / "c", "dog", "Dog", "none")).num_classes == 3


def test_image_size_resizes_and_crops_the_centre(tmp_path):
    write_classes(tmp_path, "dog", "cat")
    stripes = np.repeat(np.uint8([0, 100, 200]), 8)[None].repeat(8, axis=0)  # 24 wide, 8 high
    Image.fromarray(stripes).save(tmp_path / "cat/a.png")
    train = image_folder(tmp_path, image_size=4).train
    assert {x.shape for x, _ in train} == {(3, 4, 4)}
    assert train[0][0][:, :, 1:3].unique().tolist() == [100]


def test_pictures_of_unequal_size_are_named_with_the_cure(tmp_path):
    write_classes(tmp_path, "train/dog", "train/cat", "test/dog", "test/cat")
    Image.new("L", (5, 7)).save(tmp_path / "test/dog/a.png")
    said = [f"{tmp_path}/train/cat/a.png is 4x6 and {tmp_path}/test/dog/a.png is 5x7 pixels", "data.image_size=..."]
    with refuses(ValueError, *said):
        image_folder(tmp_path)


@pytest.mark.parametrize(
    ("folders", "said"),
    [
        (["dog"], ["ROOT must hold two class folders or more, not ['dog']", "give each class a folder"]),
        (
            ["train/dog", "train/cat", "val/dog", "val/cat"],
            ["ROOT has train and val but no test", "rename val to test"],
        ),
        (
            ["train/dog", "train/cat", "test/dog", "test/cow"],
            ["train and test in ROOT", "only train has ['cat'], only test has ['cow']", "add those folders"],
        ),
        (
            ["training/dog", "training/cat", "testing/dog", "testing/cat"],
            ["ROOT/testing holds none: each folder in ROOT is a class and must hold pictures (.jpg", "or move it away"],
        ),
    ],
)
def test_other_layouts_are_refused(tmp_path, folders, said):
    write_classes(tmp_path, *folders)
    with refuses(ValueError, *(part.replace("ROOT", str(tmp_path)) for part in said)):
        image_folder(tmp_path)


def test_a_wrong_root_or_size_is_refused(tmp_path):
    with refuses(FileNotFoundError, f"`data.root` (={tmp_path / 'absent'}) is not a folder", "class folders"):
        image_folder(tmp_path / "absent")
    with refuses(ValueError, "`data.image_size` (=0) must be at least 1 pixel, or null"):
        image_folder(tmp_path, image_size=0)


def test_a_truncated_picture_is_named_when_read(tmp_path):
    write_classes(tmp_path, "dog", "cat")
    path = tmp_path / "cat/a.png"
    Image.effect_noise((64, 64), 50).save(path)
    path.write_bytes(path.read_bytes()[:-2000])
    train = image_folder(tmp_path, image_size=4).train
    with refuses(ValueError, f"{path} cannot be read as 8-bit pixels", "truncated", "replace or remove it"):
        train[0]


def test_a_picture_without_header_is_named_at_the_start(tmp_path):
    write_classes(tmp_path, "dog", "cat")
    (tmp_path / "dog/b.png").write_bytes(b"")
    with refuses(ValueError, f"{tmp_path / 'dog/b.png'} cannot be read", "replace or remove it"):
        image_folder(tmp_path)


def test_sixteen_bits_are_refused_not_clipped(tmp_path):
    write_classes(tmp_path, "dog", "cat")
    Image.fromarray(np.full((6, 4), 300, dtype=np.uint16)).save(tmp_path / "cat/a.png")
    with refuses(ValueError, tmp_path / "cat/a.png", "8-bit pixels", "mode I;16 has more than 8 bits"):
        image_folder(tmp_path)


class Own:
    """Items as given, nothing else: duck-typed, as a user's may be."""

    def __init__(self, items: list, **attributes: object) -> None:
        self.items = items
        self.__dict__.update(attributes)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> object:
        return self.items[index]


class Stream(IterableDataset):
    def __iter__(self):
        return iter([(torch.zeros(1), 0)])


PAIR = (torch.zeros(1, 2, 2), 1)


@pytest.mark.parametrize(
    "attributes", [{"classes": ["a", "b", "c"]}, {"targets": [0, 2, 1]}, {"targets": torch.tensor([2, 0])}]
)
def test_classes_are_counted(attributes):
    train = Own([PAIR], **attributes)
    assert datasets(train) == Source(train, None, 3)


def test_num_classes_may_be_given():
    train, test = TensorDataset(torch.zeros(3, 1, 2, 2), torch.tensor([0, 1, 2])), Own([PAIR])
    assert datasets(train, test, num_classes=5) == Source(train, test, 5)


@pytest.mark.parametrize(
    ("train", "test", "num_classes", "said"),
    [
        (Own([PAIR]), None, None, ["`train` (=Own) has no .classes and no .targets", "give num_classes"]),
        (Own([PAIR]), None, 1, ["`num_classes` (=1) must be at least 2"]),
        (
            Own([PAIR], targets=range(30)),
            None,
            None,
            ["`train.targets` hold 30 different values in 30 rows", "no classes"],
        ),
        (Own([]), None, 2, ["`train` (=Own) has 0 samples", "at least one"]),
        (Own([PAIR]), Own([]), 2, ["`test` (=Own) has 0 samples"]),
        (Stream(), None, 2, ["`train` (=Stream) must have __getitem__ and __len__", "TensorDataset first"]),
        (3, None, 2, ["`train` (=int) must have __getitem__ and __len__"]),
        (
            Own([((PAIR[0], PAIR[0]), 1)]),
            None,
            2,
            ["`train` (=Own) gives x as tuple, not as one tensor: join its parts"],
        ),
        (Own([({"age": PAIR[0]}, 1)]), None, 2, ["`train` (=Own) gives x as dict, not as one tensor: join its parts"]),
        (Own([torch.zeros(3)]), None, 2, ["`train` (=Own) must have items (tensor, int label)", "wrap it"]),
        (Own([(PAIR[0], 0.5)]), None, 2, ["`train` (=Own) must have items (tensor, int label)"]),
        (Own([PAIR]), Own([{"x": 1, "y": 2}]), 2, ["`test` (=Own) must have items"]),
        (
            Own([(Image.new("L", (2, 2)), 1)]),
            None,
            2,
            ["`train` (=Own) gives x as Image, not as a tensor", "transform=PILToTensor()"],
        ),
    ],
)
def test_refuses_by_name_value_and_cure(train, test, num_classes, said):
    with refuses(ValueError, *said):
        datasets(train, test, num_classes)


def test_an_error_of_the_users_own_is_not_hidden():
    class Broken(Own):
        def __getitem__(self, index: int) -> object:
            raise ValueError("my own")

    with refuses(ValueError, "my own"):
        datasets(Broken([PAIR]), num_classes=2)


@pytest.mark.parametrize("layout", ["", "train/"])
def test_hidden_folders_and_files_are_no_classes_and_no_pictures(tmp_path, layout):
    write_classes(tmp_path / "plain", f"{layout}dog", f"{layout}cat")
    hidden = [".ipynb_checkpoints", "__MACOSX", "System Volume Information", "$RECYCLE.BIN", "@eaDir", "lost+found"]
    shown = [f"{layout}dog", f"{layout}cat"]
    write_classes(
        tmp_path / "left", *shown, *(f"{layout}{name}" for name in hidden), *(f"{shown[0]}/{n}" for n in hidden)
    )
    (tmp_path / "left" / shown[0] / "._a.png").write_bytes(b"AppleDouble")
    plain, left = (image_folder(tmp_path / name).train for name in ("plain", "left"))
    assert left.classes == plain.classes == ["cat", "dog"]
    names = [[Path(path).relative_to(part.root) for path, _ in part.samples] for part in (plain, left)]
    assert names[0] == names[1]


def test_labels_of_one_column_equal_flat_ones():
    x, y = torch.zeros(3, 2), torch.tensor([0, 2, 1])
    for rows in (TensorDataset(x, y[:, None]), Own([(a, b) for a, b in zip(x, y[:, None], strict=True)])):
        assert load(rows)[1].tolist() == [0, 2, 1]
    with refuses(ValueError, "labels have shape [3, 2]", "[N] or [N, 1]"):
        load(TensorDataset(x, torch.zeros(3, 2)))
    column = Own([(a, int(b)) for a, b in zip(x, y, strict=True)], targets=y[:, None])
    shards = SplitData(Source(column, None, 3), in_memory=False, test_fraction=0.4, val_fraction=0).labels
    assert shards.tolist() == [0, 2, 1]


@pytest.mark.parametrize(
    "part", [TensorDataset(torch.zeros(2, 1), torch.tensor([0.5, 1.0])), Own([PAIR, (PAIR[0], 0.5)])]
)
def test_labels_that_are_no_whole_numbers_are_not_cut_to_some(part):
    with refuses(InputError, "labels are torch.float", "whole numbers that count classes"):
        load(part)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_label_out_of_range_is_one_line_when_streamed_too(num_workers):
    stream = Streamed(Own([PAIR, (PAIR[0], 7)]), Normalise(), num_workers, num_classes=2)
    with pytest.raises(InputError, match=r"^labels run from 1 to 7, outside 0..1: number classes from 0[^\n]*$"):
        next(stream.stream([torch.arange(2)], CPU))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_row_of_another_shape_is_named_whatever_its_mini_batch(num_workers):
    ragged = Own([PAIR, PAIR, (torch.zeros(3), 0), (torch.zeros(3), 0)])
    said = "row 2 of the data has shape [3], and row 0 [1, 2, 2]: rows must be of one shape; pad or crop them"
    with refuses(InputError, said):
        load(ragged)
    alone = Streamed(ragged, Normalise(), num_workers).stream([torch.arange(2), torch.arange(2, 4)], CPU)
    assert next(alone)["x"].shape == (2, 1, 2, 2)
    with pytest.raises(InputError, match=f"^{re.escape(said)}[^\\n]*$"):
        next(alone)  # of two rows that are alike


class TwoWordsError(Exception):
    """Cannot be made anew from its message, as DataLoader would do with a worker's."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first}\n{second}")


class Broken(Own):
    """Rows of which some are errors."""

    def __getitem__(self, index: int) -> object:
        if isinstance(self.items[index], Exception):
            raise self.items[index]
        return self.items[index]


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize(
    ("broken", "told"),
    [
        (OSError(5, "Input/output error", "/data/7.npy"), "OSError: [Errno 5] Input/output error: '/data/7.npy'"),
        (TwoWordsError("one", "two"), "TwoWordsError: one two"),
        (StopIteration("no more"), "StopIteration: no more"),  # which would end a generator
        (None, "TypeError: cannot unpack non-iterable NoneType object"),
    ],
)
def test_a_row_that_cannot_be_read_is_one_line_with_its_number(broken, told, num_workers):
    rows, said = (
        Broken([PAIR, broken]),
        rf"^row 1 of the test rows cannot be read \({re.escape(told)}\): mend it[^\n]*$",
    )
    with pytest.raises(InputError, match=said):
        load(rows, "test rows")
    stream = Streamed(rows, Normalise(), num_workers, where="test rows").stream([torch.arange(2)], CPU)
    with pytest.raises(InputError, match=said):
        next(stream)


def test_a_first_row_that_cannot_be_read_is_told_at_the_start():
    rows = Broken([OSError("disk"), PAIR], classes=["a", "b"])
    with refuses(InputError, "row 0 of the train rows cannot be read (OSError: disk)"):
        datasets(rows)
    for in_memory in (None, True, False):
        with refuses(InputError, "row 0 of the data cannot be read (OSError: disk)"):
            SplitData(Source(rows, None, 2), in_memory=in_memory)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_damaged_picture_is_one_line_with_its_name(tmp_path, num_workers):
    write_classes(tmp_path, "dog", "cat")
    path = tmp_path / "dog/a.png"
    Image.effect_noise((64, 64), 50).save(path)
    path.write_bytes(path.read_bytes()[:-2000])
    rows = Streamed(image_folder(tmp_path, image_size=4).train, Normalise(), num_workers)
    with pytest.raises(InputError, match=f"^{re.escape(str(path))} cannot be read as[^\\n]*$"):
        next(rows.stream([torch.arange(4)], CPU))


def test_a_picture_without_bytes_is_named_at_the_start(tmp_path):
    path = write_classes(tmp_path, "dog", "cat") / "dog/b.png"
    path.write_bytes(b"")
    with refuses(ValueError, f"{path} cannot be read as a picture (it has no bytes): replace or remove it"):
        image_folder(tmp_path, image_size=4)


def test_a_picture_that_cannot_be_opened_is_named_at_the_start(tmp_path, configure):
    path = write_classes(tmp_path, "dog", "cat") / "cat/a.png"
    path.unlink()
    path.symlink_to(path)  # which nobody can open, root neither
    with pytest.raises(InputError, match=f"^.*{re.escape(str(path))}[^\\n]*$"):
        train(configure("data=image_folder", f"data.root={tmp_path}", "data.image_size=4"))
