"""``load_data(name)``: images in [0, 1] and labels, their training-time augmentation, and shuffled batches.

scikit-learn and torchvision do the reading. To add a data set, write one function that returns ``Data`` and enter it in
``DATASETS``: parameter files, the command and the tests take the names from that table.

Small data sets are tensors. Photographs are files that are decoded on use (``Photographs``): by worker processes in
training, by threads where a part of them is moved to a device.
"""

import multiprocessing
import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from kdiga_nb import paths
from kdiga_nb.numerics import distributed

SPLIT_SEED = 0


class DataError(ValueError):
    """A data set is missing or not what it should be; the message says in one line what to do."""


CLASS_NAMES = {
    "cifar10": ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
}


class Split(NamedTuple):
    """Images (n, C, H, W) in [0, 1] and their labels (n,), int64.

    Of a data set that streams, ``images`` is a ``Photographs``: slice it, then move it to a device.
    """

    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Augmentation:
    """The augmentation of the authors' code: a random crop out of the zero-padded image, and a random horizontal flip.

    ``padding`` is in pixels, ``flip`` says whether images are mirrored with probability one half.
    """

    padding: int = 0
    flip: bool = False

    def draw(self, n: int, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """The random choices for n images: how far each is shifted, and whether it is mirrored."""
        choices = {}
        if self.padding:
            choices["shift"] = torch.randint(0, 2 * self.padding + 1, (2, n, 1), generator=generator).transpose(0, 1)
        if self.flip:
            choices["mirrored"] = torch.rand(n, generator=generator) < 0.5
        return choices

    def apply(self, images: Tensor, choices: dict[str, Tensor]) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W), as drawn."""
        n, _, height, width = images.shape
        choices = {name: to_device(choice, images.device) for name, choice in choices.items()}
        if self.padding:
            rows = choices["shift"][:, 0] + torch.arange(height, device=images.device)
            columns = choices["shift"][:, 1] + torch.arange(width, device=images.device)
            padded = F.pad(images, [self.padding] * 4).permute(0, 2, 3, 1)
            index = torch.arange(n, device=images.device)[:, None, None]
            images = padded[index, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()
        if self.flip:
            images = torch.where(choices["mirrored"][:, None, None, None], images.flip(3), images)
        return images

    def __call__(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W), one draw per image."""
        return self.apply(images, self.draw(len(images), generator))


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device, without waiting for the GPU's current work."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


class Photographs:
    """Image files of a torchvision data set, decoded and resized to ``side`` × ``side`` pixels on use.

    ``photographs[start:stop]`` is a part of the files, still unread; ``photographs.to(device)`` reads the files, (n, 3,
    side, side) in [0, 1]. For training (``read`` with a seed) the crop is random in place and size and may be mirrored,
    as is usual on ImageNet (the paper does not say). Otherwise the crop is the centre of the image, whose shorter side
    is first resized to 8/7 of the crop.
    """

    def __init__(self, files: Any, order: Sequence[int], side: int):
        self.files, self.order, self.side = files, order, side

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, part: slice) -> "Photographs":
        return Photographs(self.files, self.order[part], self.side)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(n, 3, side, side)."""
        return len(self.order), 3, self.side, self.side

    def read(self, index: int, seed: int | None = None) -> Tensor:
        """One image as uint8 (3, side, side)."""
        from torchvision.transforms import v2
        from torchvision.transforms.v2 import functional as V

        image = V.pil_to_tensor(self.files[self.order[index]][0].convert("RGB"))
        if seed is None:
            small = V.resize(image, [self.side * 8 // 7], antialias=True)
            return V.center_crop(small, [self.side, self.side])
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            return v2.RandomHorizontalFlip()(v2.RandomResizedCrop(self.side, antialias=True)(image))

    def to(self, device: torch.device | str) -> Tensor:
        """All of them, read by threads."""
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            images = torch.stack(list(pool.map(self.read, range(len(self)))))
        return images.to(device).float().div_(255)


class _Reading(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """What a worker process does: read image ``index`` under ``seed`` (-1: no augmentation)."""

    def __init__(self, photographs: Photographs, labels: Tensor):
        self.photographs, self.labels = photographs, labels.tolist()

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:  # pyright: ignore[reportIncompatibleMethodOverride]
        index, seed = key
        return self.photographs.read(index, None if seed < 0 else seed), self.labels[index]


@dataclass(frozen=True)
class Data:
    """A data set: the official train and test parts, and how many of the training images are held out.

    The last ``validation_size`` examples of ``train`` are its ``validation`` part. Training only ever sees ``fitting``,
    the rest; checkpoints are selected on ``validation``; ``test`` is for measuring. ``eight_bit`` says that pixels are
    multiples of 1/255, which a device may then hold as bytes. ``single_thread`` says that one CPU thread is about
    as quick as several, as for 8×8 digits; sums then do not depend on the number of threads.
    """

    name: str
    train: Split
    test: Split
    num_classes: int
    validation_size: int
    augmentation: Augmentation = Augmentation()
    eight_bit: bool = False
    single_thread: bool = False

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        channels, height, width = self.train.images.shape[1:]
        return channels, height, width

    @property
    def fitting(self) -> Split:
        """The training examples that gradients are computed on."""
        end = len(self.train.labels) - self.validation_size
        return Split(self.train.images[:end], self.train.labels[:end])

    @property
    def validation(self) -> Split:
        """The training examples held out for selection."""
        start = len(self.train.labels) - self.validation_size
        return Split(self.train.images[start:], self.train.labels[start:])


@dataclass(frozen=True)
class Shard:
    """Which part of every batch is this process's: those whose place in it leaves ``rank`` modulo ``size``."""

    rank: int = 0
    size: int = 1

    def of(self, batch: Tensor) -> Tensor:
        """The part of a tensor whose first dimension is the batch."""
        return batch if self.size == 1 else batch[self.rank :: self.size]


class Feed:
    """The fitting part of a data set as a training takes it: shuffled, augmented batches on a device.

    ``images`` limits it to the first so many examples (0: all). In-memory images lie on the device, as bytes where they
    are of eight bits; photographs are read by worker processes ahead of need. Every process of several draws the same
    order and augmentation and takes its own shard of every batch, so the result does not depend on their number. (A
    last batch with fewer examples than there are processes is left out.)
    """

    def __init__(self, data: Data, device: torch.device, *, images: int = 0, shard: Shard | None = None):
        self.data, self.device, self.shard = data, device, shard or Shard()
        pixels, labels = data.fitting
        pixels, labels = pixels[: images or None], labels[: images or None]
        self.size = len(labels)
        self.photographs = pixels if isinstance(pixels, Photographs) else None
        if data.eight_bit and self.photographs is None:
            pixels = pixels.mul(255).round_().to(torch.uint8)
        self.split = Split(pixels if self.photographs else pixels.to(device), labels.to(device))

    def steps(self, batch_size: int) -> int:
        """How many batches an epoch has."""
        whole, rest = divmod(self.size, batch_size)
        return whole + (rest >= self.shard.size)

    def epoch(
        self,
        batch_size: int,
        generator: torch.Generator,
        augment: bool,
        *,
        skip: int = 0,
        state: Tensor | None = None,
    ) -> Iterator[Split]:
        """One epoch's batches, this process's shard of each.

        Args:
            generator: of the order and the augmentation, seeded for the epoch.
            skip, state: to resume inside an epoch: the number of batches done, and the generator's state after them.
        """
        order = torch.randperm(self.size, generator=generator)
        parts = order.split(batch_size)[skip : self.steps(batch_size)]
        if self.photographs is not None:
            yield from self._read(self.photographs, parts, generator, augment)
            return
        if state is not None:
            generator.set_state(state)
        for part in parts:
            index = to_device(self.shard.of(part), self.device)
            images, labels = self.split.images[index], self.split.labels[index]
            if images.dtype == torch.uint8:
                images = images.float().div_(255)
            if augment:
                choices = self.data.augmentation.draw(len(part), generator)
                mine = {name: self.shard.of(choice) for name, choice in choices.items()}
                images = self.data.augmentation.apply(images, mine)
            yield Split(images, labels)

    def _read(
        self, photographs: Photographs, parts: Sequence[Tensor], generator: torch.Generator, augment: bool
    ) -> Iterator[Split]:
        # Workers read batches ahead, so no draw may depend on the order of batches: an image's seed follows from one
        # draw per epoch and the image's number.
        base = int(torch.randint(2**31, (), generator=generator)) if augment else -1
        keys = [
            [(int(index), (base + int(index)) % 2**31 if augment else -1) for index in self.shard.of(part)]
            for part in parts
        ]
        # A daemonic process, such as a worker of Dask or the explorer's trainer, may start no processes.
        alone = self.size <= 256 or multiprocessing.current_process().daemon
        workers = 0 if alone else min(8, (os.cpu_count() or 1) // distributed.local_world_size())
        loader = torch.utils.data.DataLoader(
            _Reading(photographs, self.split.labels.cpu()),
            batch_sampler=keys,
            num_workers=workers,
            pin_memory=self.device.type == "cuda",
            prefetch_factor=4 if workers else None,
        )
        for images, labels in loader:
            moved = images.to(self.device, non_blocking=True).float().div_(255)
            yield Split(moved, labels.to(self.device, non_blocking=True))


def _digits(_root: Path) -> Data:
    """scikit-learn's 1,797 handwritten 8×8 digits, split 1,297 / 500 with equal class shares by a fixed seed."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    raw, target = load_digits(return_X_y=True)
    images = torch.tensor(raw, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    labels = torch.tensor(target, dtype=torch.int64)
    train, test = train_test_split(range(len(labels)), test_size=500, random_state=SPLIT_SEED, stratify=target)
    return Data(
        "digits",
        train=Split(images[train], labels[train]),
        test=Split(images[test], labels[test]),
        num_classes=10,
        validation_size=97,
        augmentation=Augmentation(padding=1),
        single_thread=True,
    )


def _transformed_digits(name: str, transform: Callable[[Tensor], Tensor], augmentation: Augmentation) -> Data:
    digits = load_data("digits")
    train, test = (Split(transform(part.images), part.labels) for part in (digits.train, digits.test))
    return replace(digits, name=name, train=train, test=test, augmentation=augmentation)


def _digits_rotated(_root: Path) -> Data:
    """Digits turned by a quarter: a source task whose strokes lie differently (stands for IGAM's TinyImageNet)."""
    rotated = _transformed_digits("digits_rotated", lambda images: images.rot90(1, (2, 3)), Augmentation(padding=1))
    return rotated


def _digits_inverted(_root: Path) -> Data:
    """Digits dark on bright, upside down: a source task with other statistics (stands for IGAM's MNIST)."""
    # Zero padding would draw a dark frame round a bright background, so these images are not shifted.
    return _transformed_digits("digits_inverted", lambda images: 1 - images.flip(2), Augmentation())


# ---- torchvision's data sets ----


def _images(pixels: Tensor, labels: Any) -> Split:
    """Bytes (n, C, H, W) and labels as a part of a data set."""
    return Split(pixels.contiguous().float().div_(255), torch.as_tensor(labels, dtype=torch.int64))


def _open(name: str, root: Path, folder: str, build: Callable[[bool], Any], archives: Sequence[tuple[str, str]]) -> Any:
    """A torchvision data set. Complete archives are unpacked; nothing is downloaded.

    Args:
        folder: where its files are, below ``root``.
        build: makes it; the argument is torchvision's ``download``, which takes whole archives as they are.
        archives: path below ``root`` and md5 of each.
    """
    from torchvision.datasets.utils import check_integrity

    packed = bool(archives) and all(check_integrity(root / path, md5) for path, md5 in archives)
    try:
        return build(packed)
    except (RuntimeError, OSError, EOFError, KeyError, ValueError, pickle.UnpicklingError) as error:
        remedy = f"kdiga data {name} --download fetches it, --data or KDIGA_DATA names another folder"
        damaged = [root / path for path, _ in archives if (root / path).is_file()]
        if damaged and not packed:
            raise DataError(f"{name}: {damaged[0]} is damaged or not whole; {remedy}") from error
        if (root / folder).exists():
            reason = str(error).strip().splitlines()[0]
            raise DataError(f"{name}: {root / folder} is damaged or not whole ({reason}); {remedy}") from error
        raise DataError(f"{name}: not found under {root}, which has no {folder}; {remedy}") from error


def _cifar10(root: Path) -> Data:
    """CIFAR-10, 50,000 and 10,000 images, with the authors' augmentation: shifts of up to 4 pixels and flips."""
    from torchvision.datasets import CIFAR10

    archive = [(CIFAR10.filename, CIFAR10.tgz_md5)]

    def part(train: bool) -> Split:
        files = _open("cifar10", root, CIFAR10.base_folder, lambda get: CIFAR10(root, train, download=get), archive)
        return _images(torch.from_numpy(files.data).permute(0, 3, 1, 2), files.targets)

    augmentation = Augmentation(padding=4, flip=True)
    return Data("cifar10", part(True), part(False), 10, 1000, augmentation, eight_bit=True)


def _download_cifar10(root: Path) -> object:
    from torchvision.datasets import CIFAR10

    return CIFAR10(root, download=True)


def _mnist(root: Path) -> Data:
    """MNIST, 60,000 and 10,000 images, as they are."""
    from torchvision.datasets import MNIST

    archives = [(f"MNIST/raw/{name}", md5) for name, md5 in MNIST.resources]

    def part(train: bool) -> Split:
        files = _open("mnist", root, "MNIST/raw", lambda get: MNIST(str(root), train, download=get), archives)
        return _images(files.data[:, None], files.targets)

    return Data("mnist", part(True), part(False), 10, 1000, eight_bit=True)


def _download_mnist(root: Path) -> object:
    from torchvision.datasets import MNIST

    return MNIST(str(root), download=True)


# Imagenette's classes among ImageNet's 1,000, in Imagenette's order.
IMAGENETTE_CLASSES = (0, 217, 482, 491, 497, 566, 569, 571, 574, 701)


def _photographs(name: str, train: Any, test: Any, side: int, classes: int, validation: int) -> Data:
    """Folders of photographs in a fixed random order, because the folders are sorted by class."""

    def part(files: Any, labels: Sequence[int]) -> Split:
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(SPLIT_SEED))
        images = cast(Tensor, Photographs(files, order.tolist(), side))
        return Split(images, torch.as_tensor(labels, dtype=torch.int64)[order])

    parts = [part(files, [label for _, label in _samples(files)]) for files in (train, test)]
    return Data(name, parts[0], parts[1], classes, min(validation, len(parts[0].labels) // 10), eight_bit=True)


def _samples(files: Any) -> Sequence[tuple[str, int]]:
    """Path and label of each file of a torchvision folder data set."""
    return files.samples if hasattr(files, "samples") else files._samples


def _imagenette(root: Path) -> Data:
    """Imagenette (ten classes of ImageNet, shorter side 160 pixels), cut to 128×128."""
    from torchvision.datasets import Imagenette

    def part(split: str) -> Any:
        build = lambda _: Imagenette(root, split, size="160px")  # noqa: E731
        return _open("imagenette", root, "imagenette2-160", build, [])

    return _photographs("imagenette", part("train"), part("val"), 128, 10, 500)


def _download_imagenette(root: Path) -> object:
    from torchvision.datasets import Imagenette

    return Imagenette(root, size="160px", download=not (root / "imagenette2-160").is_dir())


def _imagenette_32(root: Path) -> Data:
    """Imagenette at CIFAR-10's size: a source task of photographs (stands for IGAM's TinyImageNet)."""
    data = load_data("imagenette", root=root)
    train, test = (
        Split(Photographs(part.images.files, part.images.order, 32).to("cpu"), part.labels)  # pyright: ignore[reportAttributeAccessIssue]
        for part in (data.train, data.test)
    )
    return replace(data, name="imagenette_32", train=train, test=test, augmentation=Augmentation(padding=4, flip=True))


def _imagenet(root: Path) -> Data:
    """ImageNet (ILSVRC 2012), cut to 224×224."""
    from torchvision.datasets import ImageNet

    home = root / "imagenet"
    try:
        train, test = ImageNet(home, "train"), ImageNet(home, "val")
    except (RuntimeError, OSError) as error:
        wanted = "ILSVRC2012_devkit_t12.tar.gz, ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar"
        reason = str(error).strip().splitlines()[0]
        raise DataError(
            f"imagenet: put {wanted} (image-net.org, after registration), or torchvision's train/ and val/ with "
            f"meta.bin, into {home}; --data or KDIGA_DATA names another root ({reason})"
        ) from error
    return _photographs("imagenet", train, test, 224, 1000, 10_000)


@dataclass(frozen=True)
class Dataset:
    """One entry of ``DATASETS``: how to load it, and what a cost estimate must know before its files are there.

    Attributes:
        load: folder -> the data set.
        image_shape: (C, H, W); other shapes mean wrong files.
        fitting, test, classes: how many examples and classes it has.
        download: folder -> fetches the files with torchvision; None if the data set has none or needs a registration.
        imagenet_classes: the data set's classes among ImageNet's 1,000, in its own order.
    """

    load: Callable[[Path], Data]
    image_shape: tuple[int, int, int]
    fitting: int
    test: int
    classes: int = 10
    download: Callable[[Path], object] | None = None
    imagenet_classes: tuple[int, ...] | None = None


DATASETS: dict[str, Dataset] = {
    "digits": Dataset(_digits, (1, 8, 8), 1200, 500),
    "digits_rotated": Dataset(_digits_rotated, (1, 8, 8), 1200, 500),
    "digits_inverted": Dataset(_digits_inverted, (1, 8, 8), 1200, 500),
    "cifar10": Dataset(_cifar10, (3, 32, 32), 49_000, 10_000, download=_download_cifar10),
    "mnist": Dataset(_mnist, (1, 28, 28), 59_000, 10_000, download=_download_mnist),
    "imagenette": Dataset(
        _imagenette, (3, 128, 128), 8_969, 3_925, download=_download_imagenette, imagenet_classes=IMAGENETTE_CLASSES
    ),
    "imagenette_32": Dataset(_imagenette_32, (3, 32, 32), 8_969, 3_925, imagenet_classes=IMAGENETTE_CLASSES),
    "imagenet": Dataset(_imagenet, (3, 224, 224), 1_271_167, 50_000, 1000),
}


def load_data(name: str, *, root: Path | None = None) -> Data:
    """The data set of that name, on the CPU.

    Args:
        name: a key of ``DATASETS``.
        root: where files live, for the data sets that have files (default: ``paths.data()``).

    Raises:
        ValueError: an unknown name.
        DataError: its files are missing, damaged or of another shape.
    """
    if name not in DATASETS:
        raise ValueError(f"dataset must be one of {', '.join(DATASETS)}, got {name!r}")
    return _loaded(name, (root or paths.data()).absolute())


@lru_cache
def _loaded(name: str, root: Path) -> Data:
    data, shape = DATASETS[name].load(root), DATASETS[name].image_shape
    for part in (data.train, data.test):
        if part.images.shape[1:] != shape:
            raise DataError(f"{name}: images of shape {tuple(part.images.shape[1:])} under {root}, not {shape}")
        if not len(part.labels) or len(part.labels) != len(part.images):
            raise DataError(f"{name}: {len(part.images)} images and {len(part.labels)} labels under {root}")
        if int(part.labels.max()) >= data.num_classes:
            raise DataError(f"{name}: label {int(part.labels.max())} of {data.num_classes} classes under {root}")
    return data


def download(name: str, *, root: Path | None = None) -> None:
    """Fetch a data set into ``root`` with torchvision, which checks what it gets; what lies there whole is kept.

    Raises:
        DataError: a data set that cannot be downloaded, or a download that failed.
    """
    root, fetch = root or paths.data(), DATASETS[name].download if name in DATASETS else None
    if fetch is None:
        raise DataError(f"{name}: cannot be downloaded; {', '.join(n for n, d in DATASETS.items() if d.download)} can")
    try:
        root.mkdir(parents=True, exist_ok=True)
        fetch(root)
    except (RuntimeError, OSError) as error:
        raise DataError(f"{name}: the download failed ({str(error).strip().splitlines()[0]}); try again") from error
    _loaded.cache_clear()
