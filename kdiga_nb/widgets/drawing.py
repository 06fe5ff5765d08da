"""``draw(data) -> Figure``: one figure a view, all of one size, so that nothing jumps when the controls move.

Figures are made without pyplot: nothing stays open, and a draw touches no global state. A slider is moved many times,
so what takes matplotlib long is done by hand: the layout, the height of titles, and the ticks (``_set_ticks``)."""

import io
import threading
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg, RendererAgg
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpecFromSubplotSpec
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import AutoLocator, FixedFormatter, FixedLocator, LogLocator, MaxNLocator, NullLocator
from matplotlib.transforms import ScaledTranslation

from kdiga_nb.metrics import Accuracy
from kdiga_nb.params import radius_text
from kdiga_nb.report.figures import PALETTE
from kdiga_nb.widgets.views import (
    Array,
    GradientMaps,
    Loops,
    Net,
    OneImage,
    Surface,
    TradeOff,
    UnderAttack,
    ViewData,
    pretty,
)

SIZE = (11.0, 4.7)  # inches, of every view
DPI = 100
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.labelsize": 9,
    "legend.fontsize": 8,
    "text.hinting": "none",  # hinted glyphs take a tenth of the time that a picture may take
    "axes.spines.top": False,
}
STYLE |= {"axes.spines.right": False, "axes.titley": 1.02, "legend.frameon": False, "svg.hashsalt": "kdiga"}
METRICS = {"clean": (PALETTE[0], "o"), "pgd": (PALETTE[1], "s"), "autoattack": (PALETTE[2], "^")}
GREY = "0.45"
TICK = 3.5  # points; matplotlib's markers 3 and 0 are ticks down and to the left


class _Canvas(FigureCanvasAgg):
    """Figures of one size share a renderer in each thread, which remembers how large the texts are."""

    _own = threading.local()

    def get_renderer(self) -> RendererAgg:
        key = (*self.get_width_height(physical=True), self.figure.dpi)
        if getattr(self._own, "key", None) != key:
            self._own.key, self._own.renderer = key, super().get_renderer()
        return self._own.renderer


def draw(data: ViewData) -> Figure:
    """The figure of a view's data."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(SIZE, dpi=DPI)
        _Canvas(figure)
        match data:
            case TradeOff():
                _draw_trade_off(figure, data)
            case UnderAttack():
                _draw_under_attack(figure, data)
            case Loops():
                _draw_loops(figure, data)
            case OneImage():
                _draw_one_image(figure, data)
        return figure


def image_bytes(figure: Figure, kind: str = "png") -> bytes:
    """The figure as a PNG or SVG file's content; the same figure gives the same bytes."""
    buffer = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        if kind == "svg":
            figure.savefig(buffer, format="svg", metadata={"Date": None})
        else:
            # Little compression: a third of the time for a half more bytes.
            figure.savefig(buffer, format="png", pil_kwargs={"compress_level": 1})
    return buffer.getvalue()


# ---- parts ----


def _series(axes: Axes, nets: Sequence[tuple[float, Net]], metric: str, **style: Any) -> None:
    """One metric of several nets with 95 % intervals; nothing where nothing was measured."""
    points = [(x, found.accuracies[metric]) for x, found in nets if metric in found.accuracies]
    if not points:
        return
    color, marker = METRICS["pgd" if metric.startswith("pgd") else metric]
    style = {"color": color, "marker": marker, "markersize": 4.5, "linewidth": 1.3} | style
    _errorbar(axes, [x for x, _ in points], [accuracy for _, accuracy in points], **style)


def _errorbar(axes: Axes, x: Sequence[float], values: Sequence[Accuracy], **style: Any) -> None:
    axes.plot(x, [value.percent for value in values], **style)
    bars = [[(at, value.low), (at, value.high)] for at, value in zip(x, values, strict=True)]
    axes.add_collection(LineCollection(bars, colors=style["color"], linewidths=0.8))


def _set_ticks(axes: Axes, grid: bool = False, left: float = 0.38) -> None:
    """Ticks where the axes' locators want them: marks and grid are a line each, labels plain texts.

    matplotlib's own tick is an object of five artists that is made and measured anew for every picture; three axes
    spend more time on their ticks than on all else. For the same reason axis labels stand at fixed distances. To be
    called when the axes' limits are final; ``left`` is the y label's distance in inches.
    """
    inches = axes.figure.dpi_scale_trans
    axes.xaxis.set_label_coords(0.5, 0, axes.transAxes + ScaledTranslation(0, -0.3, inches))
    axes.yaxis.set_label_coords(0, 0.5, axes.transAxes + ScaledTranslation(-left, 0, inches))
    marks: dict[str, Any] = {"linestyle": "none", "color": "black", "markersize": TICK, "markeredgewidth": 0.8}
    lines: dict[str, Any] = {"color": "0.9", "linewidth": 0.6, "zorder": 0.5}
    pad = 2 * TICK / 72
    if ticks := _take_ticks(axes.xaxis):
        places, along = list(ticks), axes.get_xaxis_transform()
        axes.add_artist(Line2D(places, [0] * len(ticks), transform=along, marker=3, clip_on=False, **marks))
        if grid:
            ends = np.tile((0, 1, np.nan), len(ticks))
            axes.add_artist(Line2D(np.repeat(places, 3), ends, transform=along, **lines))
        away = along + ScaledTranslation(0, -pad, inches)
        for place, text in ticks.items():
            axes.text(place, 0, text, transform=away, ha="center", va="top")
    if ticks := _take_ticks(axes.yaxis):
        places, along = list(ticks), axes.get_yaxis_transform()
        axes.add_artist(Line2D([0] * len(ticks), places, transform=along, marker=0, clip_on=False, **marks))
        if grid:
            ends = np.tile((0, 1, np.nan), len(ticks))
            axes.add_artist(Line2D(ends, np.repeat(places, 3), transform=along, **lines))
        away = along + ScaledTranslation(-pad, 0, inches)
        for place, text in ticks.items():
            axes.text(0, place, text, transform=away, ha="right", va="center_baseline")


def _take_ticks(axis: Axis) -> dict[float, str]:
    """The axis' ticks within its limits and their labels; the axis itself has none from now on."""
    if isinstance(axis.get_major_locator(), AutoLocator):
        axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    low, high = sorted(axis.get_view_interval())
    places = [float(place) for place in axis.get_majorticklocs()]
    texts = axis.get_major_formatter().format_ticks(places)
    axis.set_major_locator(NullLocator())
    axis.set_minor_locator(NullLocator())
    return {place: text for place, text in zip(places, texts, strict=True) if low <= place <= high}


def _name_ticks(axis: Axis, names: dict[float, str]) -> None:
    """Ticks at given places, by name."""
    axis.set_major_locator(FixedLocator(list(names)))
    axis.set_major_formatter(FixedFormatter(list(names.values())))


def _note(axes: Axes, text: str) -> None:
    axes.text(0.5, 0.5, text, ha="center", va="center", transform=axes.transAxes, color=GREY, wrap=True)


def _bare(axes: Axes) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)


def _pgd(data: ViewData) -> str:
    return f"pgd{data.state.params.pgd_steps}"


# ---- λ ----


def _draw_trade_off(figure: Figure, data: TradeOff) -> None:
    left, middle, right = figure.subplots(1, 3)
    figure.subplots_adjust(left=0.055, right=0.985, bottom=0.115, top=0.87, wspace=0.26)
    pgd, epsilon = _pgd(data), data.state.params.epsilon
    # λ = 0 has no place on a log axis: it stands one stop to the left of the smallest weight.
    weights = [found.point.lambda_iga for found in data.nets]
    smallest = min(weight for weight in weights if weight > 0)
    places = [(weight or smallest / 4, found) for weight, found in zip(weights, data.nets, strict=True)]
    untrained = [place for place, found in places if not found.trained]
    here = data.state.lambda_iga or smallest / 4
    left.axvspan(here / 1.12, here * 1.12, color=PALETTE[4], alpha=0.25, linewidth=0)
    for metric in ("clean", pgd, "autoattack"):
        _series(left, places, metric, label=pretty(metric), linestyle="none" if metric == "autoattack" else "-")
    left.plot(untrained, np.zeros(len(untrained)), "|", color=GREY)
    left.set_xscale("log")
    ticks = {smallest / 4: "0"} | {x: f"{x:g}" for x in (0.125, 1.0, 8.0, 64.0)}
    _name_ticks(left.xaxis, ticks)
    left.set(ylim=(0, 103), xlim=(smallest / 6, max(weights) * 1.5))
    left.set(xlabel="λ_IGA (0: KD; short grey lines: not trained)", ylabel="accuracy (%)")
    left.set_title(f"Accuracy over λ_IGA, ε = {radius_text(epsilon)}")
    if any(found.accuracies for found in data.nets):
        left.legend(loc="lower right")
    _set_ticks(left, grid=True)
    _draw_plane(middle, data, pgd)
    _draw_curves(right, data)


def _draw_plane(axes: Axes, data: TradeOff, pgd: str) -> None:
    known = [found for found in data.nets if {"clean", pgd} <= found.accuracies.keys()]
    both = [(found.accuracies["clean"].percent, found.accuracies[pgd].percent) for found in known]
    if both:
        axes.plot(*zip(*both, strict=True), "-o", color=PALETTE[1], markersize=4.5, linewidth=1)
        for (x, y), found in zip(both, known, strict=True):
            label = f"{found.point.lambda_iga:g}"
            axes.annotate(label, (x, y), (7, 5), textcoords="offset points", color=GREY, fontsize=8)
    if data.chosen in known:
        x, y = both[known.index(data.chosen)]
        axes.plot(x, y, "o", markersize=13, markerfacecolor="none", markeredgecolor=PALETTE[4], markeredgewidth=2.2)
    else:
        _note(axes, f"λ_IGA = {data.state.lambda_iga:g}\nis not in the store")
        if not known:
            axes.set(xlim=(0, 100), ylim=(0, 100))
    axes.margins(0.12)
    axes.set(xlabel="clean accuracy (%)", ylabel=f"accuracy under {pretty(pgd)} (%)")
    axes.set_title("The trade-off; labels are λ_IGA")
    _set_ticks(axes, grid=True)


TERMS = {
    "cross_entropy": "λ_CE · cross-entropy",
    "distillation": "λ_KL · distillation",
    "alignment": "λ_IGA · alignment",
}


def _draw_curves(axes: Axes, data: TradeOff) -> None:
    axes.set_title(f"Training curves of λ_IGA = {data.state.lambda_iga:g}, by term")
    if not data.curves:
        _note(axes, "not trained yet")
        _bare(axes)
        return
    for index, (name, label) in enumerate(TERMS.items()):
        if name in data.curves:
            axes.plot(data.curves["epoch"], data.curves[name], ".-", color=PALETTE[index], label=label, linewidth=1.3)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
    axes.yaxis.set_major_formatter("{x:g}")  # plain numbers: the default sets powers of ten as formulas, slowly
    axes.set(xlabel="epoch", ylabel="weighted term, mean over the epoch (nats)")
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.legend()
    _set_ticks(axes, grid=True)


# ---- ε ----


def _draw_under_attack(figure: Figure, data: UnderAttack) -> None:
    grid = figure.add_gridspec(2, 3, width_ratios=(1.1, 1.45, 0.8), hspace=0.42, wspace=0.27)
    figure.subplots_adjust(left=0.055, right=0.985, bottom=0.115, top=0.9)
    _draw_epsilon(figure.add_subplot(grid[:, 0]), data)
    gallery = figure.add_subplot(grid[:, 1])
    if data.gallery is None:
        _note(gallery, "The chosen net or its teacher is not in the store,\nso there is nothing to attack.")
        _bare(gallery)
        return
    _draw_gallery(gallery, data)
    panels = {"student": data.gallery.student, data.gallery.teacher_name: data.gallery.teacher}
    for row, (title, probabilities) in enumerate(panels.items()):
        axes = figure.add_subplot(grid[row, 2])
        _draw_probabilities(axes, probabilities, f"class (label: {data.gallery.labels[0]})" if row else "")
        axes.set_title(f"{title.removeprefix('the ')}, image {data.state.image}")
        if row == 0:
            axes.legend(loc="upper right", handlelength=1)


def _draw_epsilon(axes: Axes, data: UnderAttack) -> None:
    pgd, epsilon = _pgd(data), data.state.params.epsilon
    axes.axvline(data.state.epsilon, color=PALETTE[4], linewidth=5, alpha=0.35)
    for index, found in enumerate(data.nets):
        color = "black" if found is data.chosen else PALETTE[index % len(PALETTE)]
        width = 2.0 if found is data.chosen else 1.0
        points = {0.0: found.accuracies.get("clean"), epsilon: found.accuracies.get(pgd)}
        for metric, accuracy in found.accuracies.items():
            if metric.startswith(f"{pgd}@"):
                points[float(metric.partition("@")[2])] = accuracy
        known = sorted((radius, accuracy) for radius, accuracy in points.items() if accuracy is not None)
        if known:
            radii, accuracies = zip(*known, strict=True)
            label = f"{found.label} (chosen)" if found is data.chosen else found.label
            _errorbar(axes, radii, accuracies, color=color, marker=".", linewidth=width, label=label)
        if "autoattack" in found.accuracies:
            _errorbar(axes, [epsilon], [found.accuracies["autoattack"]], color=color, marker="^")
    axes.set(xlabel="ε (pixels in [0, 1])", ylabel="accuracy (%)", ylim=(0, 103))
    axes.set_title(f"{pretty(pgd)} against ε (triangles: AutoAttack)")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="lower left", fontsize=7.5)
    _set_ticks(axes, grid=True)


def _draw_gallery(axes: Axes, data: UnderAttack) -> None:
    """Three rows of images in one picture: clean, perturbation magnified, attacked."""
    gallery = data.gallery
    assert gallery is not None
    count, height, width = gallery.clean.shape[:3]
    difference = gallery.attacked - gallery.clean
    scale = 0.5 / data.state.epsilon if data.state.epsilon else 1.0
    rows = [gallery.clean, (0.5 + scale * difference).clip(0, 1), gallery.attacked]
    gap = max(1, height // 8)
    canvas = np.ones((3 * height + 2 * gap, count * width + (count - 1) * gap, *gallery.clean.shape[3:]))
    for line, images in enumerate(rows):
        for column, image in enumerate(images):
            top, left = line * (height + gap), column * (width + gap)
            canvas[top : top + height, left : left + width] = image
    axes.imshow(canvas, cmap="gray", vmin=0, vmax=1, interpolation="nearest", aspect="equal")
    _bare(axes)
    for line, name in enumerate(("clean", f"change\n× {scale:.3g}", "attacked")):
        middle = (line + 0.5) * height + line * gap - 0.5
        axes.annotate(name, (-0.5, middle), (-5, 0), textcoords="offset points", ha="right", va="center")
    guesses = zip(gallery.guesses, gallery.guesses_attacked, gallery.labels, strict=True)
    for column, (before, after, label) in enumerate(guesses):
        place = (column + 0.5) * width + column * gap - 0.5, len(canvas) - 0.5
        wrong: dict[str, Any] = {} if after == label else {"color": PALETTE[3], "fontweight": "bold"}
        text = f"{before} → {after}"
        axes.annotate(text, place, (0, -5), textcoords="offset points", ha="center", va="top", **wrong)
    axes.set_title(f"{pretty(_pgd(data))} on the student, now, at ε = {radius_text(data.state.epsilon)}")
    text = "prediction, clean → attacked (bold: wrong)"
    below: dict[str, Any] = {"xycoords": "axes fraction", "textcoords": "offset points", "ha": "center", "va": "top"}
    axes.annotate(text, (0.5, 0), (0, -20), **below)


def _draw_probabilities(axes: Axes, probabilities: Array, label: str) -> None:
    """Bars by class; the classes are numbered where the axis has a label."""
    count = probabilities.shape[1]
    for offset, (values, name) in enumerate(zip(probabilities, ("clean", "attacked"), strict=True)):
        left = np.arange(count) + 0.4 * (offset - 1)
        corners = [(left, 0 * values), (left, values), (left + 0.4, values), (left + 0.4, 0 * values)]
        bars = PolyCollection(list(np.array(corners).transpose(2, 0, 1)), facecolor=PALETTE[offset], label=name)
        axes.add_collection(bars, autolim=False)
    axes.set(xlim=(-0.7, count - 0.3), ylim=(0, 1.05), xlabel=label, ylabel="probability")
    _name_ticks(axes.yaxis, {0.0: "0.0", 0.5: "0.5", 1.0: "1.0"})
    if count <= 20:
        _name_ticks(axes.xaxis, {float(number): str(number) if label else "" for number in range(count)})
    _set_ticks(axes)


# ---- loops ----


def _draw_loops(figure: Figure, data: Loops) -> None:
    figure.subplots_adjust(left=0.055, right=0.985, bottom=0.115, top=0.87)
    grid = figure.add_gridspec(1, 3, width_ratios=(1.15, 0.9, 1.35), wspace=0.24)
    accuracy, llm = figure.add_subplot(grid[0]), figure.add_subplot(grid[1])
    pgd = _pgd(data)
    for axes in (accuracy, llm):
        axes.axvline(data.state.loop, color=PALETTE[4], linewidth=5, alpha=0.35)
        axes.set_xlabel("loop (0: standard training)" if data.state.chain == "isd_wot" else "loop")
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        axes.set_xlim(-0.3, max(found.point.loop for found in data.chains[True]) + 0.3)
    for dropout, nets in data.chains.items():
        places = [(float(found.point.loop), found) for found in nets]
        style: dict[str, Any] = {"linestyle": "-"} if dropout else {"linestyle": ":", "markerfacecolor": "white"}
        for metric in ("clean", pgd, "autoattack"):
            _series(accuracy, places, metric, label=pretty(metric) if dropout else None, **style)
        measured = [(place, *found.llm) for place, found in places if found.llm is not None]
        if measured:
            place, mean, error = (np.array(column) for column in zip(*measured, strict=True))
            style |= {"color": PALETTE[7], "marker": "o", "markersize": 4.5}
            llm.plot(place, mean, label="with head dropout" if dropout else "without", **style)
            llm.vlines(place, mean - 1.96 * error, mean + 1.96 * error, PALETTE[7], linewidth=0.8)
    accuracy.set(ylim=(0, 103), ylabel="accuracy (%)")
    accuracy.set_title(f"{_chain_name(data)}, ε = {data.state.params.radius} (dotted: no dropout)")
    if accuracy.get_legend_handles_labels()[0]:
        accuracy.legend(loc="lower right", bbox_to_anchor=(1, 0.12))  # above curves that lie near 0
    llm.set_ylim(bottom=0)
    llm.set_ylabel(f"LLM (nats, mean of {data.state.params.llm_images} images)")
    llm.set_title("Local linearity (0: linear in the ball)")
    if llm.get_legend_handles_labels()[0]:
        llm.legend(loc="upper left")
    else:
        _note(llm, "not measured")
    for axes in (accuracy, llm):
        _set_ticks(axes, grid=True)
    _draw_maps(figure, grid[2], data)


def _chain_name(data: Loops) -> str:
    return {"isd_wot": "ISD without teacher", "isd_wit": "ISD with teacher"}[data.state.chain]


def _draw_maps(figure: Figure, place: Any, data: Loops) -> None:
    if data.maps is None:
        axes = figure.add_subplot(place)
        _note(axes, f"loop {data.state.loop} or its teacher\nis not in the store")
        _bare(axes)
        return
    maps: GradientMaps = data.maps
    panels = GridSpecFromSubplotSpec(2, 2, place, hspace=0.42, wspace=0.1)
    titles = {
        f"image {data.state.image}, label {maps.label}": (maps.image, None),
        f"student, ‖g‖₂ = {maps.norms[0]:.3g}": (maps.student, maps.norms[0]),
        f"{maps.teacher_name}, ‖g‖₂ = {maps.norms[1]:.3g}": (maps.teacher, maps.norms[1]),
    }
    for index, (title, (picture, norm)) in enumerate(titles.items()):
        axes = figure.add_subplot(panels[(0, 2, 3)[index] // 2, (0, 2, 3)[index] % 2])
        if norm is None:
            axes.imshow(picture, cmap="gray", vmin=0, vmax=1)
        else:
            largest = max(float(np.abs(picture).max()), 1e-12)
            axes.imshow(picture, cmap="RdBu_r", vmin=-largest, vmax=largest)
        axes.set_title(title, fontsize=8.5)
        _bare(axes)
    text = f"cosine of the two\ninput gradients:\n{maps.cosine:.3f} here,\n{maps.mean_cosine:.3f} in the mean\n"
    text += f"of {maps.images} images\n\nred: a brighter pixel\nraises the loss"
    corner = panels[0, 1].get_position(figure)
    figure.text(corner.x0 + 0.01, corner.y1, text, va="top", fontsize=8.5)


# ---- one image ----


def _draw_one_image(figure: Figure, data: OneImage) -> None:
    if data.image is None or data.surfaces is None:
        axes = figure.add_subplot()
        _note(axes, "The chosen net or its teacher is not in the store.")
        _bare(axes)
        return
    figure.subplots_adjust(left=0.012, right=0.925, bottom=0.115, top=0.87)
    grid = figure.add_gridspec(1, 5, width_ratios=(0.55, 0.8, 0.12, 1.2, 1.2), wspace=0.24)
    picture = figure.add_subplot(grid[0])
    picture.imshow(data.image, cmap="gray", vmin=0, vmax=1)
    picture.set_title(f"image {data.state.image}, label {data.label}")
    _bare(picture)
    _draw_bound(figure.add_subplot(grid[1]), data)
    highest = max(float(surface.loss.max()) for surface in data.surfaces)
    student, teacher = data.surfaces
    left, right = figure.add_subplot(grid[3]), figure.add_subplot(grid[4])
    _draw_surface(left, student, data.state.epsilon, highest)
    _draw_surface(right, teacher, data.state.epsilon, highest)
    left.set_title(data.chosen.label)
    left.set_ylabel("along a random sign pattern (pixels)")
    right.set_title(data.teacher_name.removeprefix("the "))
    right.yaxis.set_major_locator(NullLocator())
    for axes in (left, right):
        _set_ticks(axes, left=0.46)
    scale = figure.add_axes((0.978, 0.185, 0.012, 0.615))
    place: dict[str, Any] = {"origin": "lower", "extent": (0, 1, 0, highest or 1)}
    scale.imshow(np.linspace(0, 1, 256)[:, None], cmap="cividis", aspect="auto", **place)
    scale.set_ylabel("cross-entropy (nats)")
    scale.xaxis.set_major_locator(NullLocator())
    _set_ticks(scale)


def _draw_bound(axes: Axes, data: OneImage) -> None:
    base = 0.0
    for index, (name, value) in enumerate(data.terms.items()):
        axes.bar(0, value, 0.6, bottom=base, color=PALETTE[index], label=name)
        base += value
    axes.bar(1, data.gap, 0.6, color=GREY)
    _name_ticks(axes.xaxis, {0.0: f"bound\n{base:.3g}", 1.0: f"measured gap\n{data.gap:.3g}"})
    axes.set_ylabel("nats")
    axes.set_ylim(0, max(base, data.gap) * 1.42 or 1)
    axes.legend(loc="upper left", ncols=1, fontsize=7.5, handlelength=1.2, labelspacing=0.3, reverse=True)
    axes.set_title(f"Proposition 2, ε = {radius_text(data.state.epsilon)}")
    _set_ticks(axes)


def _draw_surface(axes: Axes, surface: Surface, epsilon: float, highest: float) -> None:
    reach = float(surface.axis[-1])
    place: dict[str, Any] = {"origin": "lower", "extent": (-reach, reach, -reach, reach)}
    axes.imshow(surface.loss, cmap="cividis", vmin=0, vmax=highest or 1, interpolation="bilinear", **place)
    if not surface.correct.all():
        wrong = np.where(surface.correct, np.nan, 1.0)
        axes.imshow(wrong, cmap=ListedColormap([PALETTE[3]]), alpha=0.35, interpolation="nearest", **place)
    axes.add_patch(Rectangle((-epsilon, -epsilon), 2 * epsilon, 2 * epsilon, fill=False, linestyle="--", edgecolor="w"))
    axes.plot(0, 0, "+", color="white", markersize=8)
    axes.set_xlabel("along the student's gradient sign")


# ---- as a table ----


def table(data: ViewData) -> pd.DataFrame:
    """The numbers behind a view, for readers without a kernel and for screen readers."""
    match data:
        case TradeOff() | UnderAttack():
            return _accuracy_table(data.nets)
        case Loops():
            return _accuracy_table([found for nets in data.chains.values() for found in nets])
        case OneImage():
            terms = data.terms | ({"bound": sum(data.terms.values()), "measured gap": data.gap} if data.terms else {})
            return pd.DataFrame({"nats": {name: f"{value:.3f}" for name, value in terms.items()}})


def _accuracy_table(nets: Sequence[Net]) -> pd.DataFrame:
    lines: dict[str, dict[str, str]] = {}
    for found in nets:
        if found.trained:
            lines[found.label] = {
                pretty(metric): f"{value.percent:.1f} [{value.low:.1f}, {value.high:.1f}]"
                for metric, value in found.accuracies.items()
            }
            if found.llm is not None:
                lines[found.label]["LLM (nats)"] = f"{found.llm[0]:.3f}"
    return pd.DataFrame.from_dict(lines, orient="index").fillna("–")
