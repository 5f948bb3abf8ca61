from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from tdkit.datasets.image_folder import MEAN, STD, create, decode
from tdkit.errors import UnreadableFileError, UsageError


def picture(file: Path, seed: int = 0, size: tuple[int, int] = (40, 30), mode: str = "RGB") -> Path:
    """Write an image of the given (width, height)."""
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(file)
    return file


@pytest.fixture
def flat(tmp_path) -> Path:
    for number in range(6):
        picture(tmp_path / "cat" / f"{number}.png", number)
        picture(tmp_path / "dog" / "deeper" / f"{number}.jpg", number)
    return tmp_path


def split_folder(folder: Path, *parts: str, count: int = 20) -> Path:
    for part in parts:
        for label in ("cat", "dog"):
            for number in range(count):
                picture(folder / part / label / f"{part}{number}.png", number, (8, 8))
    return folder


def collect(split, batch_size: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = zip(*split.batches(batch_size), strict=True)
    return torch.cat(images), torch.cat(labels)


@pytest.mark.parametrize("size", [(40, 30), (30, 40), (33, 33), (101, 57), (9, 250)])
def test_decoding_equals_torchvisions_transforms(tmp_path, size):
    file = picture(tmp_path / "a.png", size=size)
    reference = transforms.Compose(
        [transforms.Resize(256), transforms.CenterCrop(224), transforms.PILToTensor()]
    )
    with Image.open(file) as image:
        assert torch.equal(decode(file, (224, 224)), reference(image))


def test_an_oblong_size_keeps_the_proportions(tmp_path):
    file = tmp_path / "halves.png"
    pixels = np.zeros((100, 300, 3), dtype=np.uint8)
    pixels[:, 150:] = 255
    Image.fromarray(pixels).save(file)
    image = decode(file, (14, 28))
    assert image.shape == (3, 14, 28)
    assert image[:, :, :12].max() == 0
    assert image[:, :, 16:].min() == 255


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1", "CMYK"])
def test_every_mode_becomes_three_channels(tmp_path, mode):
    suffix = "jpg" if mode == "CMYK" else "png"
    image = decode(picture(tmp_path / f"a.{suffix}", mode=mode), (16, 16))
    assert image.shape == (3, 16, 16)
    if mode == "L":
        assert torch.equal(image[0], image[2])


def test_a_folder_of_classes_is_a_test_split(flat):
    data = create(path=str(flat))
    assert data.classes == ("cat", "dog")
    assert data.input_shape == (3, 224, 224)
    assert (data.train, data.validation) == (None, None)
    assert (data.mean, data.std) == (MEAN, STD)
    assert data.test.labels.tolist() == [0] * 6 + [1] * 6
    images, labels = collect(create(path=str(flat), image_size=14).test)
    expected = transforms.functional.normalize(
        decode(flat / "dog" / "deeper" / "2.jpg", (14, 14)) / 255, MEAN, STD
    )
    assert torch.allclose(images[8], expected)
    assert labels.tolist() == data.test.labels.tolist()


@pytest.mark.parametrize(("size", "shape"), [(20, (3, 20, 20)), ((20, 12), (3, 20, 12))])
def test_the_size_may_be_one_number_or_two(flat, size, shape):
    data = create(path=str(flat), image_size=size)
    assert data.input_shape == shape
    assert next(data.test.batches(2))[0].shape == (2, *shape)


def test_shuffling_and_augmentation_follow_the_generator(flat):
    split = create(path=str(flat), image_size=16).test
    draw = [
        next(split.batches(12, generator=torch.Generator().manual_seed(s), augment=True))
        for s in (1, 1, 2)
    ]
    assert torch.equal(draw[0][0], draw[1][0])
    assert draw[0][1].tolist() != draw[2][1].tolist()
    with pytest.raises(UsageError, match=r"needs a torch\.Generator"):
        next(split.batches(2, augment=True))


def test_images_are_only_decoded_when_asked_for(flat):
    (flat / "cat" / "0.png").write_bytes(b"not an image")
    split = create(path=str(flat), image_size=16).test
    assert len(split) == 12
    with pytest.raises(UnreadableFileError, match=r"cat.0\.png cannot be decoded as an image"):
        collect(split)


def test_a_truncated_image_is_named(flat):
    file = flat / "cat" / "0.png"
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(UnreadableFileError, match=r"0\.png cannot be decoded"):
        decode(file, (8, 8))


def test_images_without_class_folders_have_no_labels(tmp_path):
    for number in (2, 1, 3):
        picture(tmp_path / f"{number}.png", number)
    (tmp_path / "notes.txt").write_text("no image")
    data = create(path=str(tmp_path), image_size=8)
    assert data.classes == ()
    assert data.test.labels is None
    images, labels = collect(data.test, 2)
    assert labels.tolist() == [-1] * 3
    expected = transforms.functional.normalize(decode(tmp_path / "1.png", (8, 8)) / 255, MEAN, STD)
    assert torch.allclose(images[0], expected)


@pytest.mark.parametrize("held", ["val", "test"])
def test_one_held_folder_is_the_test_split_and_training_images_validate(tmp_path, held):
    data = create(path=str(split_folder(tmp_path, "train", held)), image_size=8, seed=5)
    assert [len(split) for split in (data.train, data.validation, data.test)] == [36, 4, 40]
    assert data.validation.labels.tolist() == [0, 0, 1, 1]
    assert {file.parts[-3] for file in data.test.files} == {held}
    assert {file.parts[-3] for file in data.validation.files} == {"train"}
    assert not set(data.train.files) & set(data.validation.files)
    other = create(path=str(tmp_path), image_size=8, seed=6)
    assert other.validation.files != data.validation.files


def test_with_both_held_folders_val_validates(tmp_path):
    data = create(path=str(split_folder(tmp_path, "train", "val", "test", count=3)))
    assert [len(split) for split in (data.train, data.validation, data.test)] == [6, 6, 6]
    assert {file.parts[-3] for file in data.validation.files} == {"val"}
    assert {file.parts[-3] for file in data.test.files} == {"test"}


def test_a_class_named_train_is_a_class(tmp_path):
    for name in ("bus", "train"):
        picture(tmp_path / name / "0.png")
    assert create(path=str(tmp_path)).classes == ("bus", "train")


def test_splits_with_different_classes_are_refused(tmp_path):
    split_folder(tmp_path, "train", "test", count=1)
    picture(tmp_path / "test" / "emu" / "0.png")
    with pytest.raises(UnreadableFileError, match="not every split has the class emu"):
        create(path=str(tmp_path))


def test_the_fingerprint_follows_the_files(flat):
    before = create(path=str(flat)).fingerprint
    assert create(path=str(flat)).fingerprint == before
    assert create(path=str(flat), image_size=8).fingerprint != before
    picture(flat / "dog" / "new.png")
    assert create(path=str(flat)).fingerprint != before


def test_no_path_is_a_usage_error():
    with pytest.raises(UsageError, match="image-folder needs a folder"):
        create()


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(UnreadableFileError, match="gone is not a folder"):
        create(path=str(tmp_path / "gone"))


def test_an_empty_folder_is_named(tmp_path):
    with pytest.raises(UnreadableFileError, match="holds no images"):
        create(path=str(tmp_path))


def test_an_empty_class_is_named(flat):
    (flat / "emu").mkdir()
    with pytest.raises(UnreadableFileError, match="no valid file for the classes emu"):
        create(path=str(flat))
