"""A canvas and axis ticks that draw fast.

Matplotlib spends most of a small figure's time on ticks: each tick is an object of five artists, created and measured
anew for every figure. Here all marks of an axis are one line, all grid lines another, and the labels are plain texts.
"""

import threading
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg, RendererAgg
from matplotlib.lines import Line2D
from matplotlib.ticker import AutoLocator, FixedFormatter, FixedLocator, MaxNLocator, NullLocator
from matplotlib.transforms import ScaledTranslation

TICK = 3.5  # length of a tick in points
DOWN, LEFT = 3, 0  # matplotlib's markers for a tick below the x axis and one left of the y axis
MARKS: dict[str, Any] = {"linestyle": "none", "color": "black", "markersize": TICK, "markeredgewidth": 0.8}
GRID: dict[str, Any] = {"color": "0.9", "linewidth": 0.6, "zorder": 0.5}


class FastCanvas(FigureCanvasAgg):
    """A canvas whose renderer is shared by all figures of one size in a thread: the renderer caches text sizes."""

    _own = threading.local()

    def get_renderer(self) -> RendererAgg:
        """The shared renderer."""
        key = (*self.get_width_height(physical=True), self.figure.dpi)
        if getattr(self._own, "key", None) != key:
            self._own.key, self._own.renderer = key, super().get_renderer()
        return self._own.renderer


def set_ticks(axes: Axes, grid: bool = False, left: float = 0.38) -> None:
    """Replace matplotlib's ticks by lines and texts at the places that the axes' locators choose.

    Call it when the limits of the axes are final. Axis labels get fixed distances, because measuring the tick labels is
    slow; ``left`` is the distance of the y label in inches.
    """
    inches = axes.figure.dpi_scale_trans
    axes.xaxis.set_label_coords(0.5, 0, axes.transAxes + ScaledTranslation(0, -0.3, inches))
    axes.yaxis.set_label_coords(0, 0.5, axes.transAxes + ScaledTranslation(-left, 0, inches))
    pad = 2 * TICK / 72
    if ticks := _take_ticks(axes.xaxis):
        places, along = list(ticks), axes.get_xaxis_transform()
        axes.add_artist(Line2D(places, [0] * len(ticks), transform=along, marker=DOWN, clip_on=False, **MARKS))
        if grid:
            ends = np.tile((0, 1, np.nan), len(ticks))
            axes.add_artist(Line2D(np.repeat(places, 3), ends, transform=along, **GRID))
        away = along + ScaledTranslation(0, -pad, inches)
        for place, text in ticks.items():
            axes.text(place, 0, text, transform=away, ha="center", va="top")
    if ticks := _take_ticks(axes.yaxis):
        places, along = list(ticks), axes.get_yaxis_transform()
        axes.add_artist(Line2D([0] * len(ticks), places, transform=along, marker=LEFT, clip_on=False, **MARKS))
        if grid:
            ends = np.tile((0, 1, np.nan), len(ticks))
            axes.add_artist(Line2D(ends, np.repeat(places, 3), transform=along, **GRID))
        away = along + ScaledTranslation(-pad, 0, inches)
        for place, text in ticks.items():
            axes.text(0, place, text, transform=away, ha="right", va="center_baseline")


def _take_ticks(axis: Axis) -> dict[float, str]:
    """The places and labels of the ticks within the limits of an axis; removes matplotlib's own ticks."""
    if isinstance(axis.get_major_locator(), AutoLocator):
        axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    low, high = sorted(axis.get_view_interval())
    places = [float(place) for place in axis.get_majorticklocs()]
    texts = axis.get_major_formatter().format_ticks(places)
    axis.set_major_locator(NullLocator())
    axis.set_minor_locator(NullLocator())
    return {place: text for place, text in zip(places, texts, strict=True) if low <= place <= high}


def name_ticks(axis: Axis, names: dict[float, str]) -> None:
    """Set ticks at the given places with the given labels."""
    axis.set_major_locator(FixedLocator(list(names)))
    axis.set_major_formatter(FixedFormatter(list(names.values())))
