"""Teachers prepared for a training: frozen, and either cached or folded."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property

import torch
from torch import Tensor, nn

from kdiga_nb.data import Feed
from kdiga_nb.losses import input_gradient
from kdiga_nb.numerics.folding import folded_copy
from kdiga_nb.numerics.scopes import frozen, placed


@contextmanager
def prepared_teacher(
    teacher: nn.Module | None, feed: Feed, batch_size: int, *, inputs_repeat: bool
) -> Iterator[nn.Module | None]:
    """The teacher on the device, in eval mode and without parameter gradients, for the length of a training.

    Cache the teacher's outputs when the inputs repeat every epoch; otherwise use a BatchNorm-folded copy, which is the
    same function up to rounding.
    """
    if teacher is None:
        yield None
        return
    with frozen(placed(teacher, feed.device)):
        if inputs_repeat and _fits_in_cache(feed):
            yield CachedTeacher(teacher, *feed.split, batch_size)
        else:
            _, channels, height, width = feed.split.images.shape
            yield folded_copy(teacher, (channels, height, width))


def _fits_in_cache(feed: Feed) -> bool:
    """Whether the images are float tensors on the CPU of at most 64 MiB."""
    if feed.photographs is not None:
        return False
    images = feed.split.images
    small = images.numel() * images.element_size() <= 64 * 2**20
    return small and images.is_floating_point() and images.device.type == "cpu"


class CachedTeacher(nn.Module):
    """A frozen teacher with a table of its logits and input gradients at the training images.

    Without augmentation these values never change. They are computed in batches of fixed order, so they do not depend
    on where a training was interrupted. The pixels of an image are the key of its row. Any other image, for instance an
    adversarial one, goes through the net. The table is for images on the CPU, because reading pixels would make a GPU
    wait.
    """

    def __init__(self, teacher: nn.Module, images: Tensor, labels: Tensor, batch_size: int):
        super().__init__()
        self.teacher = teacher
        self.labels = labels
        self._batches = list(zip(images.split(batch_size), labels.split(batch_size), strict=True))
        self._row = {pixels: row for row, pixels in enumerate(_pixels(images))}

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, N)."""
        return self.teacher(x)

    def rows(self, x: Tensor) -> Tensor | None:
        """The rows (B,) of the images (B, C, H, W) in the table; None if an image is not in the table."""
        rows = [self._row.get(pixels) for pixels in _pixels(x)]
        return None if None in rows else torch.tensor(rows)

    @cached_property
    def logits(self) -> Tensor:
        """f_t of the table's images, (n, N)."""
        with torch.no_grad():
            return torch.cat([self.teacher(x) for x, _ in self._batches])

    @cached_property
    def gradients(self) -> Tensor:
        """g_t of the table's images and labels, (n, C, H, W)."""
        return torch.cat([input_gradient(self.teacher, x, y)[0] for x, y in self._batches])


def _pixels(images: Tensor) -> list[bytes]:
    """The pixels of each image as bytes, which can be the key of a dictionary."""
    raw = images.detach().contiguous().numpy().tobytes()
    length = len(raw) // max(len(images), 1)
    return [raw[start : start + length] for start in range(0, len(raw), length)]
