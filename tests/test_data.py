"""Data sets, their augmentation and batches, against scikit-learn and against crops written out."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from kdiga_nb import paths
from kdiga_nb.data import DATASETS, Augmentation, Data, DataError, Feed, Shard, Split, download, load_data


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


@pytest.mark.parametrize("name", [name for name, entry in DATASETS.items() if entry.image_shape == (1, 8, 8)])
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


@pytest.mark.parametrize("name", [name for name, entry in DATASETS.items() if entry.image_shape == (1, 8, 8)])
def test_the_split_is_the_same_every_time(name: str) -> None:
    torch.manual_seed(99)
    first, second = DATASETS[name].load(paths.data()), DATASETS[name].load(paths.data())
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


def counted(n: int, augmentation: Augmentation | None = None) -> Data:
    """n images of 3×2×2 pixels, each of its number; nothing is held out."""
    labels = torch.arange(n)
    split = Split(labels.float().reshape(n, 1, 1, 1).expand(n, 3, 2, 2) / 255, labels)
    return Data("counted", split, split, n, 0, augmentation or Augmentation(), eight_bit=True)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


CPU = torch.device("cpu")


@pytest.mark.parametrize(("n", "batch_size"), [(10, 3), (10, 5), (10, 10), (10, 64), (1, 1)])
def test_an_epoch_shows_every_example_once(n: int, batch_size: int) -> None:
    feed = Feed(counted(n), CPU)
    parts = list(feed.epoch(batch_size, seeded(), False))
    full, rest = divmod(n, batch_size)
    assert [len(part.labels) for part in parts] == [batch_size] * full + [rest] * (rest > 0)
    assert feed.steps(batch_size) == len(parts)
    assert sorted(torch.cat([part.labels for part in parts]).tolist()) == list(range(n))
    for images, own in parts:
        assert torch.equal(images, (own / 255).reshape(-1, 1, 1, 1).expand_as(images))


def test_the_generator_decides_the_order_of_the_batches() -> None:
    feed = Feed(counted(50), CPU)

    def order(generator: torch.Generator) -> list[int]:
        return torch.cat([part.labels for part in feed.epoch(8, generator, False)]).tolist()

    generator = seeded(1)
    first, next_epoch = order(generator), order(generator)
    assert first == order(seeded(1))
    assert first != next_epoch and first != list(range(50))


def test_a_feed_of_some_images_shows_the_first_ones() -> None:
    feed = Feed(counted(50), CPU, images=7)
    assert sorted(torch.cat([part.labels for part in feed.epoch(3, seeded(), False)]).tolist()) == list(range(7))


@pytest.mark.parametrize("processes", [2, 3])
def test_shards_share_out_every_batch_of_one_process(processes: int) -> None:
    """Batches of 8 out of 50: the last has 2, too few for 3 processes, which leave it out."""
    data = counted(50, Augmentation(padding=1, flip=True))
    alone = list(Feed(data, CPU).epoch(8, seeded(), True))
    feeds = [Feed(data, CPU, shard=Shard(rank, processes)) for rank in range(processes)]
    together = list(zip(*(feed.epoch(8, seeded(), True) for feed in feeds), strict=True))
    assert len(together) == len(alone) - (processes == 3) == feeds[0].steps(8)
    for whole, parts in zip(alone, together, strict=False):
        for rank, part in enumerate(parts):
            assert torch.equal(part.images, whole.images[rank::processes])
            assert torch.equal(part.labels, whole.labels[rank::processes])


def test_an_epoch_goes_on_where_it_was_left() -> None:
    feed = Feed(counted(50, Augmentation(padding=1, flip=True)), CPU)
    generator, states, parts = seeded(), [], []
    for part in feed.epoch(8, generator, True):
        parts.append(part)
        states.append(generator.get_state())
    rest = list(feed.epoch(8, seeded(), True, skip=3, state=states[2]))
    assert len(rest) == 4
    for part, again in zip(parts[3:], rest, strict=True):
        assert torch.equal(part.images, again.images) and torch.equal(part.labels, again.labels)


# ---- torchvision's data sets: what is not there ----


@pytest.mark.parametrize("name", ["cifar10", "mnist", "imagenette", "imagenette_32"])
def test_a_missing_root_says_what_to_do(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"not found under .*kdiga data \w+ --download") as error:
        load_data(name, root=tmp_path / "nowhere")
    assert "\n" not in str(error.value)


def test_imagenet_says_which_files_to_put_where(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"ILSVRC2012_img_train\.tar") as error:
        load_data("imagenet", root=tmp_path)
    assert str(tmp_path / "imagenet") in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "archive"),
    [("cifar10", "cifar-10-python.tar.gz"), ("mnist", "MNIST/raw/train-images-idx3-ubyte.gz")],
)
def test_a_truncated_archive_is_named(name: str, archive: str, tmp_path: Path) -> None:
    (tmp_path / archive).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / archive).write_bytes(b"\x1f\x8b\x08 the first bytes")
    with pytest.raises(DataError, match=f"{archive} is damaged or not whole"):
        load_data(name, root=tmp_path)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({}, r"images of shape \(1, 8, 8\) under .*, not \(3, 32, 32\)"),
        ({"train": Split(torch.zeros(3, 3, 32, 32), torch.zeros(2, dtype=torch.int64))}, "3 images and 2 labels"),
        ({"train": Split(torch.zeros(1, 3, 32, 32), torch.tensor([10]))}, "label 10 of 10 classes"),
        ({"train": Split(torch.zeros(0, 3, 32, 32), torch.zeros(0, dtype=torch.int64))}, "0 images and 0 labels"),
    ],
    ids=["shape", "lengths", "label", "empty"],
)
def test_a_data_set_that_is_another_is_refused(
    change: dict, says: str, tmp_path: Path, digits: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(DATASETS, "cifar10", replace(DATASETS["cifar10"], load=lambda root: replace(digits, **change)))
    with pytest.raises(DataError, match=f"cifar10: {says}"):
        load_data("cifar10", root=tmp_path)


def test_what_cannot_be_downloaded_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="imagenet: cannot be downloaded; cifar10, mnist, imagenette can"):
        download("imagenet", root=tmp_path)


def test_a_download_that_fails_is_said_in_one_line(tmp_path: Path) -> None:
    """The tests have no network, so every download fails here."""
    with pytest.raises(DataError, match="mnist: the download failed") as error:
        download("mnist", root=tmp_path)
    assert "\n" not in str(error.value)


# ---- torchvision's data sets: the real ones, where they lie under KDIGA_DATA ----


def real(folder: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not (paths.data() / folder).is_dir(), reason=f"no {folder} under KDIGA_DATA")


@real("cifar-10-batches-py")
def test_cifar10_is_cifar10() -> None:
    data = load_data("cifar10")
    assert (len(data.train.labels), len(data.test.labels), data.image_shape) == (50_000, 10_000, (3, 32, 32))
    assert data.test.labels[:10].tolist() == [3, 8, 8, 0, 6, 6, 1, 6, 3, 1]
    assert torch.bincount(data.train.labels).tolist() == [5000] * 10
    # The channels' means that everyone normalises with.
    torch.testing.assert_close(
        data.train.images.mean((0, 2, 3)), torch.tensor([0.4914, 0.4822, 0.4465]), rtol=0, atol=1e-4
    )
    assert data.test.images.is_contiguous() and data.test.images.min() == 0 and data.test.images.max() == 1


@real("cifar-10-batches-py")
def test_bytes_on_the_device_give_back_the_pixels() -> None:
    data = load_data("cifar10")
    feed = Feed(data, CPU, images=500)
    assert feed.split.images.dtype == torch.uint8
    (batch,) = feed.epoch(500, seeded(), False)
    order = torch.randperm(500, generator=seeded())
    assert torch.equal(batch.images, data.train.images[order])


@real("cifar-10-batches-py")
def test_a_damaged_batch_of_cifar10_is_named(tmp_path: Path) -> None:
    for file in (paths.data() / "cifar-10-batches-py").iterdir():
        (tmp_path / "cifar-10-batches-py").mkdir(exist_ok=True)
        (tmp_path / "cifar-10-batches-py" / file.name).write_bytes(file.read_bytes()[:1000])
    with pytest.raises(DataError, match="cifar-10-batches-py is damaged or not whole"):
        load_data("cifar10", root=tmp_path)


@real("MNIST")
def test_mnist_is_mnist() -> None:
    data = load_data("mnist")
    assert (len(data.train.labels), len(data.test.labels), data.image_shape) == (60_000, 10_000, (1, 28, 28))
    assert data.train.images.mean().item() == pytest.approx(0.1307, abs=1e-4)


@real("imagenette2-160")
def test_imagenette_is_read_when_asked_for() -> None:
    data = load_data("imagenette")
    assert (data.image_shape, data.num_classes) == ((3, 128, 128), 10)
    shown = data.test.images[:4].to("cpu")
    assert shown.shape == (4, 3, 128, 128) and shown.min() >= 0 and shown.max() <= 1
    # Sorted by class, the first ones would all be of one.
    assert len(data.test.labels[:50].unique()) > 5 and len(data.validation.labels.unique()) > 5


@real("imagenette2-160")
def test_photographs_are_fed_by_worker_processes_whatever_their_number() -> None:
    data = load_data("imagenette")
    many, few = Feed(data, CPU, images=300), Feed(data, CPU, images=16)
    x, _ = next(iter(many.epoch(8, seeded(), True)))
    again, _ = next(iter(many.epoch(8, seeded(), True)))
    assert x.shape == (8, 3, 128, 128) and torch.equal(x, again)
    shards = [Feed(data, CPU, images=16, shard=Shard(rank, 2)) for rank in range(2)]
    for whole, *parts in zip(*(feed.epoch(8, seeded(), True) for feed in [few, *shards]), strict=True):
        for rank, part in enumerate(parts):
            assert torch.equal(part.images, whole.images[rank::2]) and torch.equal(part.labels, whole.labels[rank::2])


def first_batch(queue: Any) -> None:
    images, _ = next(iter(Feed(load_data("imagenette"), CPU, images=300).epoch(8, seeded(), True)))
    queue.put(images.numpy())


@real("imagenette2-160")
def test_a_daemonic_process_which_may_start_none_reads_the_same_photographs() -> None:
    context = get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=first_batch, args=(queue,), daemon=True)
    process.start()
    expected, _ = next(iter(Feed(load_data("imagenette"), CPU, images=300).epoch(8, seeded(), True)))
    assert torch.equal(torch.from_numpy(queue.get(timeout=120)), expected)
    process.join()


@real("imagenette2-160")
def test_imagenette_at_the_size_of_cifar10() -> None:
    data = load_data("imagenette_32")
    assert data.image_shape == (3, 32, 32)
    assert torch.equal(data.test.labels, load_data("imagenette").test.labels)
