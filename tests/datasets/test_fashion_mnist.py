import gzip
import shutil
import struct
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.datasets import FashionMNIST, mnist

from tdkit.datasets import fashion_mnist
from tdkit.datasets.fashion_mnist import create, read_idx
from tdkit.errors import UnreadableFileError

FULL = fashion_mnist.SYSTEM_FOLDERS[0]
needs_full = pytest.mark.skipif(
    not FULL.is_dir(),
    reason="the full Fashion-MNIST is not installed (Debian: dataset-fashion-mnist)",
)


def idx(array: np.ndarray) -> bytes:
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    return header + array.astype(np.uint8).tobytes()


def write(folder: Path, part: str, images: np.ndarray, labels: np.ndarray) -> None:
    for name, array in (("images-idx3", images), ("labels-idx1", labels)):
        (folder / f"{part}-{name}-ubyte.gz").write_bytes(gzip.compress(idx(array)))


@pytest.fixture
def small(tmp_path, monkeypatch) -> Path:
    """A folder with 100 training and 20 test images, and no other place to look."""
    random = np.random.default_rng(0)
    for part, count in (("train", 100), ("t10k", 20)):
        images = random.integers(0, 256, (count, 28, 28))
        write(tmp_path, part, images, np.arange(count) % 10)
    isolate(monkeypatch, tmp_path)
    return tmp_path


def isolate(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.delenv("TDKIT_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(fashion_mnist, "SYSTEM_FOLDERS", ())


def test_reading_equals_torchvision(small):
    plain = small / "plain"
    with gzip.open(small / "train-images-idx3-ubyte.gz") as source, plain.open("wb") as copy:
        shutil.copyfileobj(source, copy)
    expected = mnist.read_image_file(str(plain))
    assert torch.equal(read_idx(plain), expected)
    assert torch.equal(read_idx(small / "train-images-idx3-ubyte.gz"), expected)


def test_files_become_a_split_data_set(small):
    data = create(root=small, seed=3)
    assert data.input_shape == (1, 28, 28)
    assert [len(split) for split in (data.train, data.validation, data.test)] == [90, 10, 20]
    assert torch.bincount(data.validation.labels).tolist() == [1] * 10
    raw = read_idx(small / "t10k-images-idx3-ubyte.gz")
    assert torch.equal(data.test.images[:, 0], raw)
    assert data.test.labels.tolist() == [i % 10 for i in range(20)]


def test_unpacked_files_in_torchvisions_layout_are_found(small, tmp_path):
    raw = tmp_path / "other" / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for file in small.glob("*.gz"):
        (raw / file.stem).write_bytes(gzip.decompress(file.read_bytes()))
    assert create(root=tmp_path / "other").fingerprint == create(root=small).fingerprint


ZEROS = np.zeros((20, 28, 28))
DAMAGE = {
    "empty": (b"", "cannot be read"),
    "a web page": (b"<html>not found</html>", "cannot be read"),
    "truncated gzip": (gzip.compress(idx(ZEROS))[:40], "cannot be read"),
    "truncated header": (gzip.compress(b"\x00\x00"), "cannot be read"),
    "not IDX": (gzip.compress(b"PNG\x08 and more than sixteen bytes"), "not an IDX file of bytes"),
    "IDX of floats": (gzip.compress(b"\x00\x00\x0d\x01" + bytes(8)), "not an IDX file of bytes"),
    "too short": (gzip.compress(idx(ZEROS)[:-1]), "header promises"),
    "too long": (gzip.compress(idx(ZEROS) + b"x"), "header promises"),
    "other size": (gzip.compress(idx(ZEROS[:, :, 1:])), r"have shape \(20, 28, 27\), not"),
    "other axes": (gzip.compress(idx(ZEROS.reshape(20, 784))), r"have shape \(20, 784\), not"),
    "no images": (gzip.compress(idx(ZEROS[:0])), "there are no images"),
    "one image less": (gzip.compress(idx(ZEROS[1:])), "labels are .* not 19 integers"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_images_are_refused(small, kind):
    content, message = DAMAGE[kind]
    (small / "t10k-images-idx3-ubyte.gz").write_bytes(content)
    with pytest.raises(UnreadableFileError, match=message):
        create(root=small)


def test_a_label_out_of_range_is_refused(small):
    labels = np.arange(100) % 10
    labels[7] = 10
    (small / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels)))
    with pytest.raises(UnreadableFileError, match="training part: label 10 is outside 0 to 9"):
        create(root=small)


def test_a_missing_file_is_named(small):
    (small / "train-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(UnreadableFileError, match=r"lacks the file train-labels-idx1-ubyte\.gz"):
        create(root=small)


def test_without_a_network_the_message_says_where_to_put_the_files(tmp_path, monkeypatch, capsys):
    isolate(monkeypatch, tmp_path)

    def offline(*_, **__):
        print("Downloading")
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(mnist, "download_and_extract_archive", offline)
    with pytest.raises(UnreadableFileError, match="fashion-mnist was not found, and") as caught:
        create(root=tmp_path)
    assert "dataset-fashion-mnist" in caught.value.hint
    assert "data_root=" in caught.value.hint
    # Standard output belongs to the results.
    out, err = capsys.readouterr()
    assert out == ""
    assert "Downloading" in err


def test_a_download_goes_to_the_cache_and_is_found_again(small, tmp_path, monkeypatch):
    fetched = []

    def fetch(url, download_root, filename, md5):
        assert md5
        fetched.append(filename)
        content = (small / filename).read_bytes()
        (Path(download_root) / filename).write_bytes(content)
        (Path(download_root) / Path(filename).stem).write_bytes(gzip.decompress(content))

    expected = create(root=small).fingerprint
    monkeypatch.setattr(mnist, "download_and_extract_archive", fetch)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert create(root=empty).fingerprint == expected
    assert len(fetched) == 4
    assert (tmp_path / "cache" / "tdkit" / "FashionMNIST" / "raw").is_dir()
    assert create(root=empty).fingerprint == expected
    assert len(fetched) == 4


@needs_full
def test_the_full_data_set_has_the_papers_splits():
    data = create(seed=0)
    assert [len(split) for split in (data.train, data.validation, data.test)] == [
        55_000,
        5_000,
        10_000,
    ]
    assert torch.bincount(data.train.labels).tolist() == [5_500] * 10
    assert torch.bincount(data.validation.labels).tolist() == [500] * 10
    assert torch.bincount(data.test.labels).tolist() == [1_000] * 10
    # Of all 60,000 training images, as published with the data set.
    assert data.mean[0] == pytest.approx(0.2860, abs=1e-3)
    assert data.std[0] == pytest.approx(0.3530, abs=1e-3)
    assert create(seed=1).validation.labels.tolist() != data.validation.labels.tolist()


@needs_full
def test_the_full_test_images_equal_torchvisions(tmp_path):
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for file in FULL.glob("*.gz"):
        # torchvision wants all four files to exist, and reads two.
        content = gzip.decompress(file.read_bytes()) if file.name.startswith("t10k") else b""
        (raw / file.stem).write_bytes(content)
    theirs = FashionMNIST(str(tmp_path), train=False)
    ours = create()
    assert torch.equal(ours.test.images[:, 0], theirs.data)
    assert torch.equal(ours.test.labels, theirs.targets)
    assert list(ours.classes) == theirs.classes
