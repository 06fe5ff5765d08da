"""A net and images of one's own, for ``kdiga audit``: a function that builds the net, a folder of images by class."""

import hashlib
import importlib
import sys
from pathlib import Path

import torch
from torch import nn
from torchvision.datasets import ImageFolder
from torchvision.transforms.functional import pil_to_tensor

from kdiga_nb.data import DATASETS, Data, Dataset, Split
from kdiga_nb.models import MODELS, ImageShape, Net
from kdiga_nb.runs.checkpoints import StoreError


def own_net(text: str) -> str:
    """Enter the net that ``MODULE:FUNCTION`` builds in ``MODELS``, for this process; returns its name there.

    The function takes no arguments and returns a module: images (B, C, H, W) in [0, 1] -> logits (B, N). The module is
    looked for in the working directory too.

    Raises:
        StoreError: there is no such module or function, or it returns no module.
    """
    place, _, function = text.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        build = getattr(importlib.import_module(place), function)
        made = build()
    except Exception as error:
        raise StoreError(f"--model {text}: {type(error).__name__}: {error}".splitlines()[0]) from error
    if not isinstance(made, nn.Module):
        raise StoreError(f"--model {text}: {function}() returns a {type(made).__name__}, not a torch.nn.Module")

    def builder(num_classes: int, image_shape: ImageShape, head_dropout: float) -> nn.Module:
        return build()

    name = f"{place}.{function}"
    MODELS[name] = Net(builder)
    return name


def own_images(folder: Path) -> str:
    """Enter ``FOLDER/CLASS/IMAGE`` in ``DATASETS`` as test images, for this process; returns the name there.

    Classes are numbered in the order of their names, as torchvision's ``ImageFolder`` does; images are in [0, 1], in a
    fixed shuffled order, so that the first of them are of all classes. The name changes with the files.

    Raises:
        StoreError: there is no such folder, no image in it, or images of several sizes.
    """
    try:
        found = ImageFolder(str(folder))
        images = [pil_to_tensor(found[place][0]).float() / 255 for place in range(len(found))]
    except (OSError, ValueError) as error:  # also torchvision's: no class folder, no image
        raise StoreError(f"--data {folder}: {error}".splitlines()[0]) from error
    shapes = {tuple(image.shape) for image in images}
    if len(shapes) > 1:
        raise StoreError(f"--data {folder}: images of several sizes: {', '.join(map(str, sorted(shapes)))}")
    digest = hashlib.sha256()
    for path, _ in found.samples:
        digest.update(str(Path(path).relative_to(folder)).encode() + Path(path).read_bytes())
    name = f"folder_{digest.hexdigest()[:12]}"
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    split = Split(torch.stack(images)[order], torch.tensor(found.targets)[order])
    classes = len(found.classes)
    channels, height, width = images[0].shape
    data = Data(name, split, split, num_classes=classes, validation_size=0)
    DATASETS[name] = Dataset(lambda _: data, (channels, height, width), len(images), len(images), classes)
    return name
