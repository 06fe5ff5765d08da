"""A strip of small test images to choose from."""

import base64
import io
import itertools
from collections.abc import Callable, Sequence

import ipywidgets as ipw
from matplotlib.image import imsave
from torch import Tensor

from kdiga_nb.data import Data
from kdiga_nb.widgets.finding import SHOWN

SIDE = 44  # pixels of a thumbnail on the page
_numbers = itertools.count()  # two explorers on one page have their own style sheets


class Thumbnails:
    """Buttons that show test images; a click chooses the image.

    A button of ipywidgets has no picture, so each has a class of its own, and a style sheet gives it a background.

    Attributes:
        widget: the strip.
        images: the numbers of the test images shown.
    """

    def __init__(self, choose: Callable[[int], None]) -> None:
        self.images: list[int] = []
        self._prefix = f"kdiga-thumb-{next(_numbers)}"
        self._style = ipw.HTML()
        layout = {"width": f"{SIDE}px", "height": f"{SIDE}px", "padding": "0"}
        self.buttons = [ipw.Button(layout=ipw.Layout(**layout)) for _ in range(SHOWN)]
        for place, button in enumerate(self.buttons):
            button.add_class(f"{self._prefix}-{place}")
            button.on_click(lambda _, place=place: choose(self.images[place]))
        self.widget = ipw.HBox([self._style, *self.buttons], layout=ipw.Layout(flex_flow="row wrap"))

    def show(self, data: Data, images: Sequence[int], class_name: Callable[[int], str]) -> None:
        """Offer these test images, at most ``SHOWN``; ``class_name`` gives the name of a label."""
        self.images = list(images)[:SHOWN]
        rules = [f"[class*={self._prefix}] {{ background-size: cover; image-rendering: pixelated }}"]
        for place, image in enumerate(self.images):
            source = _source(data.test.images[image : image + 1][0])
            rules.append(f".{self._prefix}-{place} {{ background-image: url({source}) }}")
            self.buttons[place].tooltip = f"image {image}: {class_name(int(data.test.labels[image]))}"
        for place, button in enumerate(self.buttons):
            button.layout.display = "flex" if place < len(self.images) else "none"
        self._style.value = f"<style>{' '.join(rules)}</style>"

    def mark(self, image: int) -> None:
        """Frame the chosen image, if it is in the strip."""
        for place, button in enumerate(self.buttons):
            here = place < len(self.images) and self.images[place] == image
            (button.add_class if here else button.remove_class)("kdiga-chosen")


def _source(image: Tensor) -> str:
    """A test image (C, H, W) in [0, 1] as the address of a PNG, thinned out to about twice a thumbnail's size."""
    step = max(image.shape[-1] // (2 * SIDE), 1)
    pixels = image[:, ::step, ::step].permute(1, 2, 0).squeeze(2).cpu().numpy()
    buffer = io.BytesIO()
    imsave(buffer, pixels, cmap="gray", vmin=0, vmax=1, format="png")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
