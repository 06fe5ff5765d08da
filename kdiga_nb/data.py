"""``load_data(name)``: images in [0, 1] and labels, their training-time augmentation, and shuffled batches.

scikit-learn does the reading. To add a data set, write one function that returns ``Data`` and enter it in ``DATASETS``:
parameter files, the command and the tests take their names from there.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

SPLIT_SEED = 0


class Split(NamedTuple):
    """Images (n, C, H, W) in [0, 1] and their labels (n,), int64."""

    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Augmentation:
    """The paper's augmentation: a random crop out of the zero-padded image, and a random horizontal flip.

    ``padding`` is in pixels, ``flip`` says whether images are mirrored with probability one half.
    """

    padding: int = 0
    flip: bool = False

    def __call__(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W), one draw an image."""
        n, _, height, width = images.shape
        if self.padding:
            shift = torch.randint(0, 2 * self.padding + 1, (2, n, 1), generator=generator).to(images.device)
            rows = shift[0] + torch.arange(height, device=images.device)
            columns = shift[1] + torch.arange(width, device=images.device)
            padded = F.pad(images, [self.padding] * 4).permute(0, 2, 3, 1)
            index = torch.arange(n, device=images.device)[:, None, None]
            images = padded[index, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()
        if self.flip:
            mirrored = torch.rand(n, generator=generator).to(images.device) < 0.5
            images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
        return images


@dataclass(frozen=True)
class Data:
    """A data set: the official train and test parts, and how many of the training images are held out.

    The last ``validation_size`` examples of ``train`` are its ``validation`` part. Training only ever sees ``fitting``,
    the rest; checkpoints are selected on ``validation``; ``test`` is for measuring.
    """

    name: str
    train: Split
    test: Split
    num_classes: int
    validation_size: int
    augmentation: Augmentation = Augmentation()

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


def batches(split: Split, batch_size: int, generator: torch.Generator) -> Iterator[Split]:
    """One epoch of shuffled batches; the last may be smaller."""
    order = torch.randperm(len(split.labels), generator=generator).to(split.labels.device)
    for index in order.split(batch_size):
        yield Split(split.images[index], split.labels[index])


def _digits(_root: Path | None) -> Data:
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
    )


def _transformed_digits(name: str, transform: Callable[[Tensor], Tensor], augmentation: Augmentation) -> Data:
    digits = load_data("digits")
    train, test = (Split(transform(part.images), part.labels) for part in (digits.train, digits.test))
    return Data(name, train, test, digits.num_classes, digits.validation_size, augmentation)


def _digits_rotated(_root: Path | None) -> Data:
    """Digits turned by a quarter: a source task whose strokes lie differently (stands for IGAM's TinyImageNet)."""
    rotated = _transformed_digits("digits_rotated", lambda images: images.rot90(1, (2, 3)), Augmentation(padding=1))
    return rotated


def _digits_inverted(_root: Path | None) -> Data:
    """Digits dark on bright, upside down: a source task with other statistics (stands for IGAM's MNIST)."""
    # Zero padding would draw a dark frame round a bright background, so these images are not shifted.
    return _transformed_digits("digits_inverted", lambda images: 1 - images.flip(2), Augmentation())


DATASETS: dict[str, Callable[[Path | None], Data]] = {
    "digits": _digits,
    "digits_rotated": _digits_rotated,
    "digits_inverted": _digits_inverted,
}


@lru_cache
def load_data(name: str, *, root: Path | None = None) -> Data:
    """The data set of that name, on the CPU.

    Args:
        name: a key of ``DATASETS``.
        root: where files live, for the data sets that have files (default: ``paths.data()``).

    Raises:
        ValueError: an unknown name.
    """
    if name not in DATASETS:
        raise ValueError(f"dataset must be one of {', '.join(DATASETS)}, got {name!r}")
    return DATASETS[name](root)
