import numpy as np
import pytest
import torch

from tdkit.datasets import fashion_mnist
from tdkit.datasets.sample import FILE, SEED, build, create
from tdkit.errors import UnreadableFileError

needs_full = pytest.mark.skipif(
    not fashion_mnist.SYSTEM_FOLDERS[0].is_dir(),
    reason="the full Fashion-MNIST is not installed (Debian: dataset-fashion-mnist)",
)


def rows(images: torch.Tensor) -> set[bytes]:
    return {image.numpy().tobytes() for image in images}


def test_sizes_and_classes_are_balanced():
    data = create()
    assert len(data.test) == 2_000
    assert len(data.train) + len(data.validation) == 1_000
    for split in (data.train, data.validation, data.test):
        counts = torch.bincount(split.labels).tolist()
        assert counts == [len(split) // 10] * 10
        # Neighbours are of different classes, so a part of a split is balanced as well.
        assert len(set(split.labels[:40].tolist())) > 5


def test_the_file_is_small_and_licensed():
    assert FILE.stat().st_size < 2e6
    licence = (FILE.parent / "LICENSE-fashion-mnist").read_text(encoding="utf-8")
    assert "MIT License" in licence
    assert "Zalando SE" in licence


@needs_full
def test_each_split_comes_from_the_full_one_and_is_standardised_alike():
    data, full = create(), fashion_mnist.create(seed=SEED)
    assert (data.mean, data.std) == (full.mean, full.std)
    assert data.classes == full.classes
    for name in ("train", "validation", "test"):
        small, large = getattr(data, name), getattr(full, name)
        assert rows(small.images) <= rows(large.images)
        assert (small.mean, small.std) == (full.mean, full.std)


@needs_full
def test_building_again_gives_the_same_file(tmp_path):
    build(tmp_path / "again.npz")
    assert (tmp_path / "again.npz").read_bytes() == FILE.read_bytes()


@pytest.mark.parametrize(
    "content", [b"", b"text", FILE.read_bytes()[:5_000]], ids=["empty", "text", "truncated"]
)
def test_a_damaged_file_is_unreadable(tmp_path, content):
    file = tmp_path / "sample.npz"
    file.write_bytes(content)
    with pytest.raises(UnreadableFileError, match=r"sample\.npz cannot be read"):
        create(file=file)


def test_a_missing_array_is_named(tmp_path):
    file = tmp_path / "sample.npz"
    np.savez(file, mean=[0.0], std=[1.0])
    with pytest.raises(UnreadableFileError, match=r"cannot be read.*train_images"):
        create(file=file)


def test_a_pickle_inside_is_not_loaded(tmp_path):
    file = tmp_path / "sample.npz"
    np.savez(file, mean=np.array([object()], dtype=object))
    with pytest.raises(UnreadableFileError, match="cannot be read"):
        create(file=file)
