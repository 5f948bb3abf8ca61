import itertools
from dataclasses import replace

import pytest
import torch
from torchvision.transforms import functional

from tdkit.datasets.base import (
    TensorSplit,
    channel_statistics,
    check_images,
    crop_and_flip,
    image_order,
    in_memory_dataset,
    kept_on,
    standardise,
    stratified_split,
    validation_size,
)
from tdkit.errors import UnreadableFileError, UsageError

MEAN, STD = (0.2, 0.5), (0.1, 0.3)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_images(count: int, *shape: int) -> torch.Tensor:
    return torch.randint(1, 256, (count, *shape), generator=seeded(9), dtype=torch.uint8)


def numbered_split(count: int) -> TensorSplit:
    """Image i is filled with i, and its label is i."""
    images = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 4, 4)
    return TensorSplit(images, torch.arange(count), (0.0,), (1 / 255,))


def test_a_subset_has_the_images_and_labels_at_its_positions():
    split = numbered_split(9)
    chosen = split.subset(torch.tensor([7, 0, 3]))
    images, labels = next(chosen.batches(3))
    assert labels.tolist() == [7, 0, 3]
    assert [round(float(image.mean())) for image in images] == [7, 0, 3]
    assert len(split) == 9
    unlabelled = TensorSplit(split.images, None, split.mean, split.std)
    assert unlabelled.subset(torch.tensor([2])).labels is None


def test_every_augmented_image_is_one_that_brute_force_makes():
    image = random_images(1, 2, 5, 7)[0]
    padded = functional.pad(image, [4] * 4)
    corners = itertools.product(range(9), range(9))
    crops = [functional.crop(padded, top, left, 5, 7) for top, left in corners]
    table = {crop.numpy().tobytes(): (number, False) for number, crop in enumerate(crops)}
    for number, crop in enumerate(crops):
        table[functional.hflip(crop).numpy().tobytes()] = (number, True)
    assert len(table) == 162
    augmented = crop_and_flip(image.expand(5000, -1, -1, -1), seeded())
    seen = [table[one.numpy().tobytes()] for one in augmented]
    # Each of the 162 results is expected 31 times; none is missed, none is three times as likely.
    counts = torch.tensor([seen.count(key) for key in table.values()])
    assert 5 < counts.min() <= counts.max() < 65
    assert abs(sum(flipped for _, flipped in seen) / 5000 - 0.5) < 0.03


def test_augmentation_moves_all_channels_of_an_image_alike_and_keeps_images_apart():
    plane = random_images(30, 1, 6, 6)
    augmented = crop_and_flip(plane.expand(-1, 3, -1, -1), seeded())
    assert torch.equal(augmented[:, 0], augmented[:, 2])
    for before, after in zip(plane, augmented, strict=True):
        assert set(after.unique().tolist()) <= set(before.unique().tolist()) | {0}


def test_augmentation_follows_its_generator_alone():
    images = random_images(20, 1, 8, 8)
    before = torch.get_rng_state()
    first, second = crop_and_flip(images, seeded(1)), crop_and_flip(images, seeded(1))
    assert torch.equal(first, second)
    assert not torch.equal(first, crop_and_flip(images, seeded(2)))
    assert torch.equal(before, torch.get_rng_state())


def test_standardising_equals_torchvision():
    images = random_images(3, 2, 4, 5)
    expected = functional.normalize(images.float() / 255, MEAN, STD)
    assert torch.allclose(standardise(images, MEAN, STD), expected)
    assert standardise(images, MEAN, STD).dtype == torch.float32
    assert torch.allclose(standardise(images.double() / 255, MEAN, STD), expected)


def test_channel_statistics_equal_the_float_formula():
    images = random_images(50, 3, 6, 7)
    images[:, 1] //= 3
    images[:, 2] = 8
    mean, std = channel_statistics(images)
    pixels = images.double() / 255
    assert mean == pytest.approx(pixels.mean((0, 2, 3)).tolist())
    assert std[:2] == pytest.approx(pixels.std((0, 2, 3), correction=0).tolist()[:2])
    assert std[2] == 1.0


def test_stratified_split_gives_each_class_its_share():
    labels = torch.tensor([0] * 50 + [1] * 30 + [3] * 20)[torch.randperm(100, generator=seeded())]
    rest, chosen = stratified_split(labels, 10, seeded(1))
    assert torch.bincount(labels[chosen], minlength=4).tolist() == [5, 3, 0, 2]
    assert sorted(torch.cat([rest, chosen]).tolist()) == list(range(100))
    assert rest.tolist() == sorted(rest.tolist())


@pytest.mark.parametrize("size", [0, 1, 4, 7, 11])
def test_stratified_split_has_the_size_asked_for_when_shares_are_no_integers(size):
    labels = torch.tensor([0] * 5 + [1] * 3 + [2] * 3)
    rest, chosen = stratified_split(labels, size, seeded())
    assert (len(rest), len(chosen)) == (11 - size, size)
    counts = torch.bincount(labels[chosen], minlength=3)
    exact = torch.tensor([5, 3, 3]) * size / 11
    assert ((counts - exact).abs() < 1).all()


def test_stratified_split_is_seeded():
    labels = torch.arange(10).repeat(20)
    one, same, other = (stratified_split(labels, 50, seeded(s))[1].tolist() for s in (1, 1, 2))
    assert one == same
    assert one != other


def test_validation_is_at_most_a_tenth_and_5000():
    counts = [60_000, 50_000, 1_000, 9]
    assert [validation_size(count) for count in counts] == [5_000, 5_000, 100, 0]


def test_without_a_generator_batches_keep_the_order():
    batches = list(numbered_split(7).batches(3))
    assert [len(labels) for _, labels in batches] == [3, 3, 1]
    assert torch.cat([labels for _, labels in batches]).tolist() == list(range(7))
    images = torch.cat([images for images, _ in batches])
    assert images.dtype == torch.float32
    assert torch.allclose(images[:, 0, 0, 0], torch.arange(7.0), atol=1e-4)


def test_with_a_generator_batches_are_shuffled_and_complete():
    batches = list(numbered_split(50).batches(8, generator=seeded()))
    images, labels = (torch.cat(part) for part in zip(*batches, strict=True))
    assert labels.tolist() != list(range(50))
    assert sorted(labels.tolist()) == list(range(50))
    assert torch.allclose(images[:, 0, 0, 0], labels.float(), atol=1e-4)


def test_each_pass_with_one_generator_has_another_order():
    split, generator = numbered_split(50), seeded()
    first, second = (next(split.batches(50, generator=generator))[1] for _ in range(2))
    assert first.tolist() != second.tolist()


def test_augmentation_only_happens_when_asked_for():
    images = random_images(40, 1, 6, 6)
    split = TensorSplit(images, None, (0.0,), (1 / 255,))
    plain = torch.cat([batch for batch, _ in split.batches(9)])
    assert torch.allclose(plain, images.float(), atol=1e-3)
    order = torch.randperm(40, generator=seeded(4))
    changed = torch.cat([b for b, _ in split.batches(9, generator=seeded(4), augment=True)])
    assert not torch.allclose(changed, images[order].float(), atol=1e-3)


def test_augmentation_needs_a_generator():
    with pytest.raises(UsageError, match=r"needs a torch\.Generator"):
        next(numbered_split(4).batches(2, augment=True))


def test_a_limit_takes_evenly_spaced_images():
    assert image_order(10, None, 4).tolist() == [0, 2, 5, 7]
    assert image_order(10, None, 99).tolist() == list(range(10))
    drawn = image_order(1000, seeded(), 4)
    assert len(set(drawn.tolist())) == 4
    assert drawn.tolist() != [0, 250, 500, 750]
    labels = torch.cat([labels for _, labels in numbered_split(10).batches(3, limit=4)])
    assert labels.tolist() == [0, 2, 5, 7]


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_below_one_is_refused(limit):
    with pytest.raises(UsageError, match=f"at least 1, not {limit}"):
        next(numbered_split(4).batches(2, limit=limit))


def test_a_batch_size_below_one_is_refused():
    with pytest.raises(UsageError, match="batch size must be at least 1, not 0"):
        next(numbered_split(4).batches(0))


def test_unlabelled_images_have_labels_of_minus_one():
    split = TensorSplit(random_images(5, 2, 3, 3), None, MEAN, STD)
    assert torch.cat([labels for _, labels in split.batches(2)]).tolist() == [-1] * 5


GOOD = torch.zeros(4, 1, 2, 2)
LABELS = torch.tensor([0, 1, 2, 1])


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (GOOD.int(), LABELS, "my data: images are torch.int32, not uint8 or float"),
        (GOOD[:, 0], LABELS, r"my data: images have shape \(4, 2, 2\), not \(n, c, h, w\)"),
        (GOOD[:0], LABELS[:0], "my data: there are no images"),
        (GOOD * torch.nan, LABELS, "my data: some pixels are NaN or infinite"),
        (GOOD + torch.inf, LABELS, "my data: some pixels are NaN or infinite"),
        (GOOD, LABELS[:3], r"labels are torch.int64 of shape \(3,\), not 4 integers"),
        (GOOD, LABELS.float(), r"labels are torch.float32 of shape \(4,\), not 4 integers"),
        (GOOD, LABELS + 1, "my data: label 3 is outside 0 to 2"),
        (GOOD, LABELS - 1, "my data: label -1 is outside 0 to 2"),
    ],
)
def test_unusable_images_are_refused(images, labels, message):
    with pytest.raises(UnreadableFileError, match=message) as caught:
        check_images("my data", images, labels, 3)
    assert caught.value.hint


def test_usable_images_are_accepted():
    check_images("my data", GOOD, LABELS, 3)
    check_images("my data", GOOD.byte(), None, 0)


def make(seed: int = 0, change: int = 0):
    images = random_images(200, 1, 4, 4)
    images[0, 0, 0, 0] += change
    labels = torch.arange(200) % 4
    return in_memory_dataset("toy", tuple("abcd"), (images, labels), (images[:8], labels[:8]), seed)


def test_a_data_set_is_split_by_class_and_standardised_by_its_training_part():
    data = make()
    assert [len(split) for split in (data.train, data.validation, data.test)] == [180, 20, 8]
    assert torch.bincount(data.validation.labels).tolist() == [5] * 4
    assert data.input_shape == (1, 4, 4)
    assert (data.mean, data.std) == channel_statistics(data.train.images)
    pixels = torch.cat([images for images, _ in data.train.batches(64)])
    assert float(pixels.mean()) == pytest.approx(0, abs=1e-4)
    assert float(pixels.std()) == pytest.approx(1, abs=1e-3)
    assert data.test.mean == data.validation.mean == data.mean


def test_the_fingerprint_follows_contents_and_split():
    assert make().fingerprint == make().fingerprint
    different = [make(), make(seed=1), make(change=-1)]
    assert len({data.fingerprint for data in different}) == 3


def test_parts_of_different_size_are_refused():
    labels = torch.arange(20) % 2
    train, test = (random_images(20, 1, 4, 4), labels), (random_images(20, 1, 5, 4), labels)
    with pytest.raises(UnreadableFileError, match="training and test images differ in size"):
        in_memory_dataset("toy", ("a", "b"), train, test, 0)


def test_small_splits_in_memory_are_kept_on_a_device(monkeypatch):
    monkeypatch.setattr("tdkit.datasets.base._KEPT_BYTES", 50 * 2 * 4 * 4)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (60, 2, 4, 4), generator=generator, dtype=torch.uint8)
    part = images, torch.arange(60) % 2
    dataset = in_memory_dataset("small", ("a", "b"), part, part, 0)
    kept = kept_on(dataset, torch.device("meta"))
    # 54, 6 and 60 images.
    places = [split.images.device.type for split in (kept.train, kept.validation, kept.test)]
    assert places == ["cpu", "meta", "cpu"]
    assert kept.fingerprint == dataset.fingerprint
    (pixels, labels), *_ = kept.validation.batches(4, limit=5)
    assert (pixels.device.type, pixels.dtype, pixels.shape) == ("meta", torch.float32, (4, 2, 4, 4))
    assert torch.equal(labels, next(dataset.validation.batches(4, limit=5))[1])


def test_a_split_that_a_device_has_no_room_for_stays_where_it_is():
    class TooLarge(torch.Tensor):
        def to(self, *args, **kwargs):
            raise torch.OutOfMemoryError("CUDA out of memory")

    part = random_images(20, 1, 4, 4), torch.arange(20) % 2
    dataset = in_memory_dataset("small", ("a", "b"), part, part, 0)
    test = replace(dataset.test, images=dataset.test.images.as_subclass(TooLarge))
    kept = kept_on(replace(dataset, test=test), torch.device("meta"))
    assert kept.test is test
    assert kept.train.images.device.type == "meta"
