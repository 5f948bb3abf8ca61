import hashlib
import pickle
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.datasets import CIFAR10, cifar
from torchvision.transforms import functional

from tdkit.datasets.cifar10 import create
from tdkit.errors import UnreadableFileError

CLASSES = [f"class {number}" for number in range(10)]


def _write(file: Path, content: object) -> str:
    data = pickle.dumps(content, protocol=2)
    file.write_bytes(data)
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


@pytest.fixture
def small(tmp_path, monkeypatch) -> tuple[Path, type[CIFAR10]]:
    """Two training batches and a test batch of 50 images, and the class that knows their sums."""
    monkeypatch.delenv("TDKIT_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()
    random = np.random.default_rng(0)
    sums = {}
    for name in ("data_batch_1", "data_batch_2", "test_batch"):
        pixels = random.integers(0, 256, (50, 3072), dtype=np.uint8)
        labels = [number % 10 for number in range(50)]
        sums[name] = _write(folder / name, {"data": pixels, "labels": labels})
    meta = _write(folder / "batches.meta", {"label_names": CLASSES})

    known = {
        "train_list": [[name, sums[name]] for name in ("data_batch_1", "data_batch_2")],
        "test_list": [["test_batch", sums["test_batch"]]],
        "meta": {"filename": "batches.meta", "key": "label_names", "md5": meta},
    }
    return tmp_path, type("Small", (CIFAR10,), known)


def test_batches_become_a_split_data_set(small):
    root, reader = small
    data = create(root=root, seed=1, reader=reader)
    assert data.classes == tuple(CLASSES)
    assert data.input_shape == (3, 32, 32)
    assert [len(split) for split in (data.train, data.validation, data.test)] == [90, 10, 50]
    assert torch.bincount(data.validation.labels).tolist() == [1] * 10
    assert len(data.mean) == len(data.std) == 3


def test_pixels_and_labels_equal_torchvisions(small):
    root, reader = small
    data, theirs = create(root=root, reader=reader), reader(str(root), train=False)
    expected = torch.stack([functional.pil_to_tensor(image) for image, _ in theirs])
    assert torch.equal(data.test.images, expected)
    assert data.test.labels.tolist() == [label for _, label in theirs]


def test_a_damaged_batch_is_refused_before_it_is_unpickled(small, tmp_path):
    root, reader = small

    class Harm:
        def __reduce__(self):
            return Path.touch, (tmp_path / "harm",)

    (root / CIFAR10.base_folder / "test_batch").write_bytes(pickle.dumps(Harm()))
    with pytest.raises(UnreadableFileError, match="cifar-10-batches-py is incomplete or damaged"):
        create(root=root, reader=reader)
    assert not (tmp_path / "harm").exists()


def test_a_missing_batch_is_refused(small):
    root, reader = small
    (root / CIFAR10.base_folder / "data_batch_2").unlink()
    with pytest.raises(UnreadableFileError, match="incomplete or damaged"):
        create(root=root, reader=reader)


def test_a_label_out_of_range_is_refused(small):
    root, reader = small
    pixels = np.zeros((5, 3072), dtype=np.uint8)
    entry = {"data": pixels, "labels": [0, 1, 2, 3, 10]}
    reader.test_list[0][1] = _write(root / CIFAR10.base_folder / "test_batch", entry)
    with pytest.raises(UnreadableFileError, match="test part: label 10 is outside 0 to 9"):
        create(root=root, reader=reader)


def test_without_a_network_the_message_says_where_to_put_the_files(tmp_path, monkeypatch, capsys):
    def offline(*_, **__):
        print("Downloading")
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.delenv("TDKIT_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(cifar, "download_and_extract_archive", offline)
    with pytest.raises(UnreadableFileError, match="cifar10 was not found, and") as caught:
        create(root=tmp_path)
    assert "data_root=" in caught.value.hint
    # Standard output belongs to the results.
    out, err = capsys.readouterr()
    assert out == ""
    assert "Downloading" in err
