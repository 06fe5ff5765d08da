"""Digits, their augmentation and batches, against scikit-learn and against crops written out."""

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from kdiga_nb.data import DATASETS, Augmentation, Data, Split, batches, load_data


def rows(images: Tensor) -> Counter[tuple[int, ...]]:
    """The images as a multiset of their pixels in sixteenths."""
    return Counter(tuple(image) for image in (16 * images.flatten(1)).round().long().tolist())


def coloured(n: int, seed: int = 0) -> Tensor:
    """Images (n, 3, 5, 7) without two equal pixels, so that every shift and mirror image differs."""
    return torch.rand(n, 3, 5, 7, generator=torch.Generator().manual_seed(seed)) * 0.9 + 0.05


def crops(image: Tensor, padding: int) -> list[Tensor]:
    """Every crop of the zero-padded image (C, H, W), row by row."""
    _, height, width = image.shape
    padded = nn.functional.pad(image, [padding] * 4)
    offsets = range(2 * padding + 1)
    return [padded[:, top : top + height, left : left + width] for top in offsets for left in offsets]


def indices_of_crops(shifted: Tensor, images: Tensor, padding: int) -> list[int]:
    """Which crop of its image each shifted image is; one that is none fails."""
    found = []
    for after, before in zip(shifted, images, strict=True):
        matches = [i for i, crop in enumerate(crops(before, padding)) if torch.equal(crop, after)]
        assert len(matches) == 1
        found += matches
    return found


@pytest.mark.parametrize("name", [name for name in DATASETS if name.startswith("digits")])
def test_digits_come_in_the_documented_shape(name: str) -> None:
    data = load_data(name)
    assert data.name == name
    assert (len(data.train.labels), len(data.test.labels), data.num_classes) == (1297, 500, 10)
    assert data.image_shape == (1, 8, 8)
    for part in (data.train, data.test):
        assert part.images.shape == (len(part.labels), 1, 8, 8)
        assert part.images.dtype == torch.float32 and part.labels.dtype == torch.int64
        assert part.images.min() == 0 and part.images.max() == 1
        assert part.labels.unique().tolist() == list(range(10))


def test_train_and_test_share_out_scikit_learns_digits_without_overlap(digits: Data) -> None:
    raw, target = load_digits(return_X_y=True)
    together = rows(torch.cat([digits.train.images, digits.test.images]))
    assert together == rows(torch.tensor(raw).reshape(-1, 1, 8, 8) / 16)
    shares = torch.bincount(torch.tensor(target)) * 500 / 1797
    assert (torch.bincount(digits.test.labels) - shares).abs().max() < 1


def test_labels_stay_with_their_images(digits: Data) -> None:
    raw, target = load_digits(return_X_y=True)
    pixels, digit = torch.tensor(raw).long().tolist(), torch.tensor(target).tolist()
    labels = {tuple(image): label for image, label in zip(pixels, digit, strict=True)}
    for image, label in zip(digits.test.images, digits.test.labels, strict=True):
        assert labels[tuple((16 * image.flatten()).round().long().tolist())] == label


@pytest.mark.parametrize("name", [name for name in DATASETS if name.startswith("digits")])
def test_the_split_is_the_same_every_time(name: str) -> None:
    torch.manual_seed(99)
    first, second = DATASETS[name](None), DATASETS[name](None)
    for part, again in zip((*first.train, *first.test), (*second.train, *second.test), strict=True):
        assert torch.equal(part, again)


def test_fitting_and_validation_are_the_training_part_in_two(digits: Data) -> None:
    assert 0 < len(digits.validation.labels) == digits.validation_size < 1297
    for whole, fitting, validation in zip(digits.train, digits.fitting, digits.validation, strict=True):
        assert torch.equal(torch.cat([fitting, validation]), whole)


def test_without_a_validation_part_all_is_fitted() -> None:
    split = Split(coloured(4), torch.arange(4))
    data = Data("four", split, split, num_classes=4, validation_size=0)
    assert torch.equal(data.fitting.images, split.images) and not len(data.validation.labels)


@pytest.mark.parametrize(
    ("name", "back"),
    [
        ("digits_rotated", lambda images: images.rot90(-1, (2, 3))),
        ("digits_inverted", lambda images: (1 - images).flip(2)),
    ],
)
def test_the_source_tasks_are_the_digits_transformed(name: str, back: Callable[[Tensor], Tensor], digits: Data) -> None:
    data = load_data(name)
    for part, original in ((data.train, digits.train), (data.test, digits.test)):
        assert torch.equal(back(part.images), original.images)
        assert not torch.equal(part.images, original.images)
        assert torch.equal(part.labels, original.labels)


def test_an_unknown_data_set_is_refused_by_name() -> None:
    with pytest.raises(ValueError) as error:
        load_data("digitz")
    assert "'digitz'" in str(error.value)
    assert all(name in str(error.value) for name in DATASETS)


@pytest.mark.parametrize("padding", [1, 2])
def test_a_shift_is_a_crop_of_the_padded_image_and_every_crop_is_as_likely(padding: int) -> None:
    images = coloured(60 * (2 * padding + 1) ** 2)
    shifted = Augmentation(padding=padding)(images, torch.Generator().manual_seed(0))
    assert shifted.shape == images.shape and shifted.dtype == images.dtype
    counts = Counter(indices_of_crops(shifted, images, padding))
    # 60 draws a crop are expected; half and double lie four and more standard deviations away.
    assert len(counts) == (2 * padding + 1) ** 2
    assert min(counts.values()) > 30 and max(counts.values()) < 120


def test_a_flip_mirrors_half_of_the_images_left_to_right() -> None:
    images = coloured(400)
    flipped = Augmentation(flip=True)(images, torch.Generator().manual_seed(0))
    mirrored = [torch.equal(after, before.flip(2)) for after, before in zip(flipped, images, strict=True)]
    kept = [torch.equal(after, before) for after, before in zip(flipped, images, strict=True)]
    assert all(m != k for m, k in zip(mirrored, kept, strict=True))
    assert 150 < sum(mirrored) < 250


def test_shift_and_flip_together_lose_no_pixel_but_at_the_edge() -> None:
    images = coloured(50)
    both = Augmentation(padding=1, flip=True)(images, torch.Generator().manual_seed(0))
    for after, before in zip(both, images, strict=True):
        assert any(torch.equal(after, crop) or torch.equal(after, crop.flip(2)) for crop in crops(before, 1))


def test_no_augmentation_is_the_identity_and_draws_nothing() -> None:
    images, generator = coloured(3), torch.Generator().manual_seed(0)
    before = generator.get_state()
    assert torch.equal(Augmentation()(images, generator), images)
    assert torch.equal(generator.get_state(), before)


def test_the_generator_decides_the_augmentation() -> None:
    images, augmentation = coloured(20), Augmentation(padding=2, flip=True)
    before = torch.get_rng_state()
    draws = [augmentation(images, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("n", "batch_size"), [(10, 3), (10, 5), (10, 10), (10, 64), (1, 1)])
def test_an_epoch_of_batches_shows_every_example_once(n: int, batch_size: int) -> None:
    labels = torch.arange(n)
    split = Split(labels.float().reshape(n, 1, 1, 1), labels)
    parts = list(batches(split, batch_size, torch.Generator().manual_seed(0)))
    full, rest = divmod(n, batch_size)
    assert [len(part.labels) for part in parts] == [batch_size] * full + [rest] * (rest > 0)
    assert sorted(torch.cat([part.labels for part in parts]).tolist()) == list(range(n))
    for images, own in parts:
        assert torch.equal(images.flatten().long(), own)


def test_the_generator_decides_the_order_of_the_batches() -> None:
    labels = torch.arange(50)
    split = Split(labels.float().reshape(50, 1, 1, 1), labels)

    def order(generator: torch.Generator) -> list[int]:
        return torch.cat([part.labels for part in batches(split, 8, generator)]).tolist()

    generator = torch.Generator().manual_seed(1)
    first, next_epoch = order(generator), order(generator)
    assert first == order(torch.Generator().manual_seed(1))
    assert first != next_epoch and first != labels.tolist()
