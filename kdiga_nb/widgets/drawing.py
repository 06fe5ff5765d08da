"""``draw(data) -> Figure``: one figure per view, all of one size, so that the page does not jump.

Figures are made without pyplot: no figure stays open, and no global state changes. A moved slider must redraw quickly,
so the layout and the height of titles are fixed, and ``fast_axes`` draws the ticks.
"""

import io
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpecFromSubplotSpec
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from kdiga_nb.metrics import Accuracy
from kdiga_nb.params import radius_text
from kdiga_nb.report.colors import METRICS as METRIC_COLORS
from kdiga_nb.report.colors import method_color
from kdiga_nb.report.figures import PALETTE
from kdiga_nb.report.names import metric_name
from kdiga_nb.widgets.fast_axes import FastCanvas, name_ticks, set_ticks
from kdiga_nb.widgets.views import (
    Array,
    Facet,
    Film,
    Glance,
    GradientMaps,
    Loops,
    NetView,
    OneImage,
    Surface,
    TradeOff,
    UnderAttack,
    ViewData,
    curve,
)

SIZE = (11.0, 5.4)  # inches, of every view
DPI = 120  # 1320 pixels: sharp on a page of 1280; a larger picture is slower to draw
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.labelsize": 9,
    "legend.fontsize": 8,
    "text.hinting": "none",  # hinting costs a tenth of the time budget of a figure
    "axes.spines.top": False,
}
STYLE |= {"axes.spines.right": False, "axes.titley": 1.02, "legend.frameon": False, "svg.hashsalt": "kdiga"}
METRICS = {
    kind: (METRIC_COLORS[kind], marker) for kind, marker in {"clean": "o", "pgd": "s", "autoattack": "^"}.items()
}
GREY = "0.45"
CONSIDERED = 0.05  # the probability from which on the first view names a class


def draw(data: ViewData) -> Figure:
    """The figure of a view's data."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(SIZE, dpi=DPI)
        FastCanvas(figure)
        match data:
            case Glance():
                _draw_glance(figure, data)
            case TradeOff():
                _draw_trade_off(figure, data)
            case UnderAttack():
                _draw_under_attack(figure, data)
            case Film():
                _draw_film(figure, data)
            case Loops():
                _draw_loops(figure, data)
            case OneImage():
                _draw_one_image(figure, data)
        return figure


def image_bytes(figure: Figure, kind: str = "png") -> bytes:
    """The content of a PNG or SVG file of the figure; the same figure gives the same bytes."""
    buffer = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        if kind == "svg":
            figure.savefig(buffer, format="svg", metadata={"Date": None})
        else:
            # Low compression takes a third of the time and half as many bytes more.
            figure.savefig(buffer, format="png", pil_kwargs={"compress_level": 1})
    return buffer.getvalue()


# ---- parts ----


def _series(axes: Axes, nets: Sequence[tuple[float, NetView]], metric: str, **style: Any) -> None:
    """One metric of several nets with 95 % intervals; nets without the metric are left out."""
    points = [(x, net.accuracies[metric]) for x, net in nets if metric in net.accuracies]
    if not points:
        return
    color, marker = METRICS.get(metric, METRICS["pgd"])
    style = {"color": color, "marker": marker, "markersize": 4.5, "linewidth": 1.3} | style
    _errorbar(axes, [x for x, _ in points], [accuracy for _, accuracy in points], **style)


def _errorbar(axes: Axes, x: Sequence[float], values: Sequence[Accuracy], **style: Any) -> None:
    axes.plot(x, [value.percent for value in values], **style)
    bars = [[(at, value.low), (at, value.high)] for at, value in zip(x, values, strict=True)]
    axes.add_collection(LineCollection(bars, colors=style["color"], linewidths=0.8))


def _note(axes: Axes, text: str) -> None:
    axes.text(0.5, 0.5, text, ha="center", va="center", transform=axes.transAxes, color=GREY, wrap=True)


def _bare(axes: Axes) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)


def _pgd(data: ViewData) -> str:
    return f"pgd{data.state.params.pgd_steps}"


# ---- at a glance ----


def _draw_glance(figure: Figure, data: Glance) -> None:
    """One column per net: input gradient, attacked image, smallest ε that fools it, belief before and after.

    All pictures are one canvas and all bars one plot, because making a plot takes longer than filling it.
    """
    picture = figure.add_axes((0.075, 0.475, 0.165, 0.355))
    picture.imshow(data.image, cmap="gray", vmin=0, vmax=1)
    picture.set_title(f"image {data.state.image}: {data.state.class_name(data.label)}")
    _bare(picture)
    _draw_smallest(figure.add_axes((0.075, 0.1, 0.16, 0.17)), data)
    width = data.image.shape[1]
    gap = max(1, round(0.17 * width))
    _draw_columns(figure.add_axes((0.275, 0.315, 0.715, 0.62), anchor="N"), data, gap)
    _draw_beliefs(figure.add_axes((0.275, 0.1, 0.715, 0.17)), data, width, gap)


def _draw_columns(axes: Axes, data: Glance, gap: int) -> None:
    """Two rows of pictures, input gradients and attacked images, with text above and below each column."""
    height, width = data.image.shape[:2]
    between = max(2, round(0.26 * height))
    blank = np.ones((height, width, 3))
    rows: list[list[Array]] = [[], []]
    for column, (name, facet) in enumerate(data.facets.items()):
        middle = column * (width + gap) + width / 2 - 0.5
        if facet is None:
            _beside(axes, name, (middle, -0.5), above=True)
            _beside(axes, "no net in\nthe store", (middle, height / 2))
            rows[0].append(blank)
            rows[1].append(blank)
            continue
        largest = max(float(np.abs(facet.gradient).max()), 1e-12)
        rows[0].append(matplotlib.colormaps["RdBu_r"](0.5 + 0.5 * facet.gradient / largest)[..., :3])
        rows[1].append(facet.attacked)
        _beside(axes, name, (middle, -0.5), above=True, color=method_color(facet.row), fontweight="bold", fontsize=9.5)
        _beside(axes, f"‖g‖₂ = {facet.norm:.2g}", (middle, height - 0.5))
        guess = int(facet.beliefs[1].argmax())
        wrong: dict[str, Any] = {} if guess == data.label else {"color": PALETTE[3], "fontweight": "bold"}
        verdict = "still" if guess == data.label else "now"
        text = f"{verdict} {data.state.class_name(guess)} ({100 * facet.beliefs[1, guess]:.0f} %)"
        _beside(axes, text, (middle, 2 * height + between - 0.5), **wrong)
    axes.imshow(_mosaic(rows, gap, between), interpolation="nearest")
    _bare(axes)
    for line, text in enumerate(("input gradient", f"attacked, ε = {radius_text(data.state.epsilon)}")):
        middle = line * (height + between) + height / 2 - 0.5
        style: dict[str, Any] = {"rotation": 90, "ha": "right", "va": "center", "textcoords": "offset points"}
        axes.annotate(text, (-0.5, middle), (-5, 0), **style)


def _beside(axes: Axes, text: str, place: tuple[float, float], above: bool = False, **style: Any) -> None:
    """A text centred 5 points below or above a place in data units."""
    distance = (0, 5) if above else (0, -5)
    style = {"ha": "center", "va": "bottom" if above else "top"} | style
    axes.annotate(text, place, distance, textcoords="offset points", **style)


def _mosaic(rows: Sequence[Sequence[Array]], gap: int, between: int) -> Array:
    """Pictures (H, W) or (H, W, 3) as one RGB picture: columns ``gap`` white pixels apart, rows ``between``."""
    height, width = rows[0][0].shape[:2]
    columns = len(rows[0])
    canvas = np.ones((len(rows) * (height + between) - between, columns * (width + gap) - gap, 3))
    for line, pictures in enumerate(rows):
        for column, picture in enumerate(pictures):
            top, left = line * (height + between), column * (width + gap)
            colours = picture if picture.ndim == 3 else picture[..., None]
            canvas[top : top + height, left : left + width] = colours.clip(0, 1)
    return canvas


def _draw_beliefs(axes: Axes, data: Glance, width: int, gap: int) -> None:
    """The probabilities of every class, clean and attacked, below the column of each net."""
    ticks: dict[float, str] = {}
    for column, facet in enumerate(data.facets.values()):
        if facet is None:
            continue
        count = facet.beliefs.shape[1]
        left, size = column * (width + gap) - 0.5, width / count
        _bars(axes, facet.beliefs, left + size * (np.arange(count) + 0.1), 0.4 * size, first=not ticks)
        # Only the classes that the net considers: fifty numbers would be slow to draw and no easier to read.
        shown = np.flatnonzero(facet.beliefs.max(0) >= CONSIDERED)
        ticks |= {left + size * (number + 0.5): str(number) for number in shown.tolist()}
    axes.set(xlim=(-0.5, len(data.facets) * (width + gap) - gap - 0.5), ylim=(0, 1.05), ylabel="probability")
    axes.set_xlabel(f"class (shown from {100 * CONSIDERED:.0f} % on)")
    name_ticks(axes.yaxis, {0.0: "0", 0.5: "0.5", 1.0: "1"})
    name_ticks(axes.xaxis, ticks)
    set_ticks(axes)
    handles, labels = axes.get_legend_handles_labels()
    axes.figure.legend(handles, [f"belief, {label}" for label in labels], loc="lower left", ncols=2)


def _bars(axes: Axes, probabilities: Array, places: Array, size: float, first: bool = True) -> None:
    """Pairs of bars, clean and attacked, from ``places`` on; only the first call enters the legend."""
    for offset, (values, name) in enumerate(zip(probabilities, ("clean", "attacked"), strict=True)):
        left = places + size * offset
        corners = [(left, 0 * values), (left, values), (left + size, values), (left + size, 0 * values)]
        label = name if first else f"_{name}"
        bars = PolyCollection(list(np.array(corners).transpose(2, 0, 1)), facecolor=PALETTE[offset], label=label)
        axes.add_collection(bars, autolim=False)


def _brief(name: str) -> str:
    """A column's name without its weight, and only the last word of two: penalty, teacher."""
    return name.partition(",")[0].rpartition(" ")[2]


def _draw_smallest(axes: Axes, data: Glance) -> None:
    """The smallest radius that fools each net, as bars; an arrow where none of the radii does."""
    reach = data.state.radii[-1]
    known = [(name, facet) for name, facet in data.facets.items() if facet is not None]
    for place, (_, facet) in enumerate(known):
        shown = reach if facet.smallest is None else facet.smallest
        text = f"> {radius_text(reach)}" if facet.smallest is None else radius_text(facet.smallest)
        axes.barh(-place, shown, 0.7, color=method_color(facet.row))
        box = {"facecolor": axes.get_facecolor(), "edgecolor": "none", "pad": 0.5}  # covers the line of the chosen ε
        axes.annotate(text, (shown, -place), (3, 0), textcoords="offset points", va="center", fontsize=8, bbox=box)
    axes.axvline(data.state.epsilon, color="black", linewidth=1, linestyle="--", zorder=1.5)
    axes.set(xlim=(0, 1.3 * reach), ylim=(0.6 - max(len(known), 1), 0.6))
    name_ticks(axes.yaxis, {-float(place): _brief(name) for place, (name, _) in enumerate(known)})
    name_ticks(axes.xaxis, {radius: radius_text(radius) for radius in (0.0, reach / 2, reach)})
    axes.set_title("smallest ε that fools it")
    set_ticks(axes)


# ---- λ ----


def _draw_trade_off(figure: Figure, data: TradeOff) -> None:
    left, middle, right = figure.subplots(1, 3)
    figure.subplots_adjust(left=0.055, right=0.985, bottom=0.115, top=0.87, wspace=0.26)
    pgd, epsilon = _pgd(data), data.state.params.epsilon
    # λ = 0 has no place on a log axis, so λ = 0 is drawn left of the smallest weight.
    weights = [net.point.lambda_iga for net in data.nets]
    smallest = min(weight for weight in weights if weight > 0)
    places = [(weight or smallest / 4, net) for weight, net in zip(weights, data.nets, strict=True)]
    untrained = [place for place, net in places if not net.trained]
    here = data.state.lambda_iga or smallest / 4
    left.axvspan(here / 1.12, here * 1.12, color=PALETTE[4], alpha=0.25, linewidth=0)
    for metric, band in data.bands.items():
        x, low, high = zip(*((weight or smallest / 4, low, high) for weight, low, high in band), strict=True)
        left.fill_between(x, low, high, color=METRICS.get(metric, METRICS["pgd"])[0], alpha=0.2, linewidth=0)
    for metric in ("clean", pgd, "autoattack"):
        _series(left, places, metric, label=metric_name(metric), linestyle="none" if metric == "autoattack" else "-")
    left.plot(untrained, np.full(len(untrained), 1.5), "o", color=GREY, markersize=4.5, markerfacecolor="white")
    left.set_xscale("log")
    ticks = {smallest / 4: "0"} | {x: f"{x:g}" for x in (0.125, 1.0, 8.0, 64.0)}
    name_ticks(left.xaxis, ticks)
    left.set(ylim=(0, 103), xlim=(smallest / 6, max(weights) * 1.5))
    left.set(xlabel="λ_IGA (0: KD; hollow points: not trained)", ylabel="accuracy (%)")
    left.set_title(f"Accuracy over λ_IGA, ε = {radius_text(epsilon)}" + " (band: all seeds)" * bool(data.bands))
    if any(net.accuracies for net in data.nets):
        left.legend(loc="lower right")
    set_ticks(left, grid=True)
    _draw_plane(middle, data, pgd)
    _draw_curves(right, data)


def _draw_plane(axes: Axes, data: TradeOff, pgd: str) -> None:
    known = [net for net in data.nets if {"clean", pgd} <= net.accuracies.keys()]
    both = [(net.accuracies["clean"].percent, net.accuracies[pgd].percent) for net in known]
    if both:
        axes.plot(*zip(*both, strict=True), "-o", color=PALETTE[1], markersize=4.5, linewidth=1)
        _label_weights(axes, both, known, data.chosen)
    if data.chosen in known:
        x, y = both[known.index(data.chosen)]
        axes.plot(x, y, "o", markersize=13, markerfacecolor="none", markeredgecolor=PALETTE[4], markeredgewidth=2.2)
    else:
        _note(axes, f"λ_IGA = {data.state.lambda_iga:g}\nis not in the store")
        if not known:
            axes.set(xlim=(0, 100), ylim=(0, 100))
    axes.margins(0.12)
    axes.set(xlabel="clean accuracy (%)", ylabel=f"accuracy under {metric_name(pgd)} (%)")
    axes.set_title("Trade-off (labels: λ_IGA)")
    set_ticks(axes, grid=True)


def _label_weights(axes: Axes, points: Sequence[tuple[float, float]], nets: Sequence[NetView], chosen: NetView) -> None:
    """The weight beside each point, the chosen one's first; a label that would cover another one is left out."""
    spread = np.maximum(np.ptp(points, axis=0), 1.0)
    placed: list[Array] = []
    for index in sorted(range(len(nets)), key=lambda index: nets[index] is not chosen):
        at = np.array(points[index]) / spread
        if all((np.abs(at - other) > (0.12, 0.05)).any() for other in placed):
            placed.append(at)
            label = f"{nets[index].point.lambda_iga:g}"
            axes.annotate(label, points[index], (9, 4), textcoords="offset points", color=GREY, fontsize=8)


TERMS = {
    "cross_entropy": "λ_CE · cross-entropy",
    "distillation": "λ_KL · distillation",
    "alignment": "λ_IGA · alignment",
}


def _draw_curves(axes: Axes, data: TradeOff) -> None:
    axes.set_title(f"Training loss by term, λ_IGA = {data.state.lambda_iga:g}")
    if not data.curves:
        _note(axes, "not trained yet")
        _bare(axes)
        return
    for index, (name, label) in enumerate(TERMS.items()):
        if name in data.curves:
            axes.plot(data.curves["epoch"], data.curves[name], ".-", color=PALETTE[index], label=label, linewidth=1.3)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
    axes.yaxis.set_major_formatter("{x:g}")  # plain numbers: the default draws powers of ten as formulas, which is slow
    axes.set(xlabel="epoch", ylabel="weighted term (nats)")
    axes.set_xlim(0.5, data.chosen.run.schedule.epochs + 0.5)  # the curve grows while the net trains
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.legend()
    set_ticks(axes, grid=True)


# ---- ε ----


def _draw_under_attack(figure: Figure, data: UnderAttack) -> None:
    grid = figure.add_gridspec(2, 3, width_ratios=(1.1, 1.45, 0.8), hspace=0.42, wspace=0.27)
    figure.subplots_adjust(left=0.055, right=0.985, bottom=0.115, top=0.9)
    _draw_epsilon(figure.add_subplot(grid[:, 0]), data)
    gallery = figure.add_subplot(grid[:, 1])
    if data.gallery is None:
        _note(gallery, "The chosen net or its teacher\nis not in the store.")
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
    for net in data.nets:
        color = method_color(net.row)
        width = 2.0 if net is data.chosen else 1.0
        if known := curve(net, data.state):
            radii, accuracies = zip(*known, strict=True)
            label = f"{net.label} (chosen)" if net is data.chosen else net.label
            _errorbar(axes, radii, accuracies, color=color, marker=".", linewidth=width, label=label)
        if "autoattack" in net.accuracies:
            _errorbar(axes, [epsilon], [net.accuracies["autoattack"]], color=color, marker="^")
    axes.set(xlabel="ε (pixels in [0, 1])", ylabel="accuracy (%)", ylim=(0, 103))
    axes.set_title(f"{metric_name(pgd)} against ε (triangles: AutoAttack)")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="lower left")
    set_ticks(axes, grid=True)


def _draw_gallery(axes: Axes, data: UnderAttack) -> None:
    """Three rows of images in one picture: clean, magnified perturbation, attacked."""
    gallery = data.gallery
    assert gallery is not None
    height, width = gallery.clean.shape[1:3]
    difference = gallery.attacked - gallery.clean
    scale = 0.5 / data.state.epsilon if data.state.epsilon else 1.0
    gap = max(1, height // 8)
    canvas = _mosaic([list(gallery.clean), list(0.5 + scale * difference), list(gallery.attacked)], gap, gap)
    axes.imshow(canvas, interpolation="nearest", aspect="equal")
    _bare(axes)
    for line, name in enumerate(("clean", f"change\n× {scale:.3g}", "attacked")):
        middle = (line + 0.5) * height + line * gap - 0.5
        axes.annotate(name, (-0.5, middle), (-5, 0), textcoords="offset points", ha="right", va="center")
    guesses = zip(gallery.guesses, gallery.guesses_attacked, gallery.labels, strict=True)
    for column, (before, after, label) in enumerate(guesses):
        place = (column + 0.5) * width + column * gap - 0.5, len(canvas) - 0.5
        wrong: dict[str, Any] = {} if after == label else {"color": PALETTE[3], "fontweight": "bold"}
        _beside(axes, f"{before} → {after}", place, **wrong)
    axes.set_title(f"{metric_name(_pgd(data))} on the student, ε = {radius_text(data.state.epsilon)}")
    text = "prediction, clean → attacked (bold: wrong)"
    below: dict[str, Any] = {"xycoords": "axes fraction", "textcoords": "offset points", "ha": "center", "va": "top"}
    axes.annotate(text, (0.5, 0), (0, -20), **below)


def _draw_probabilities(axes: Axes, probabilities: Array, label: str) -> None:
    """One pair of bars per class; class numbers are shown if the x axis has a label."""
    count = probabilities.shape[1]
    _bars(axes, probabilities, np.arange(count) - 0.4, 0.4)
    axes.set(xlim=(-0.7, count - 0.3), ylim=(0, 1.05), xlabel=label, ylabel="probability")
    name_ticks(axes.yaxis, {place: f"{place:.1f}" for place in (0.0, 0.5, 1.0)})
    if count <= 20:
        name_ticks(axes.xaxis, {float(number): str(number) if label else "" for number in range(count)})
    set_ticks(axes)


# ---- the attack film ----


def _draw_film(figure: Figure, data: Film) -> None:
    """The image, its change and the attacked image at one step; the loss so far; the belief before and now."""
    figure.subplots_adjust(left=0.07, right=0.985, bottom=0.11, top=0.92)
    grid = figure.add_gridspec(2, 3, height_ratios=(1.25, 1), hspace=0.38, wspace=0.24)
    pictures = [figure.add_subplot(grid[0, column]) for column in range(3)]
    loss, belief = figure.add_subplot(grid[1, :2]), figure.add_subplot(grid[1, 2])
    for axes in pictures:
        _bare(axes)
    pictures[0].imshow(data.clean, cmap="gray", vmin=0, vmax=1)
    pictures[0].set_title(f"image {data.state.image}: {data.state.class_name(data.label)}")
    if not len(data.frames):
        _note(loss, "this net is not in the store")
        for axes in (loss, belief):
            _bare(axes)
        return
    step, epsilon = data.step, data.state.epsilon
    scale = 0.5 / epsilon if epsilon else 1.0
    pictures[1].imshow((0.5 + scale * (data.frames[step] - data.clean)).clip(0, 1), cmap="gray", vmin=0, vmax=1)
    pictures[1].set_title(f"change × {scale:.3g}, step {step} of {len(data.frames) - 1}")
    pictures[2].imshow(data.frames[step], cmap="gray", vmin=0, vmax=1)
    answer = int(data.beliefs[1 + step].argmax())
    wrong: dict[str, Any] = {} if answer == data.label else {"color": PALETTE[3], "fontweight": "bold"}
    verdict = "still" if answer == data.label else "now"
    pictures[2].set_title(f"attacked, ε = {radius_text(epsilon)}: {verdict} {data.state.class_name(answer)}", **wrong)
    _draw_losses(loss, data)
    _draw_probabilities(belief, data.beliefs[[0, 1 + step]], "class")
    belief.legend(loc="upper left", ncols=2, bbox_to_anchor=(-0.02, 1.16))


def _draw_losses(axes: Axes, data: Film) -> None:
    """Cross-entropy after each step: past steps in full, later ones pale; a cross where the net is first fooled."""
    steps = np.arange(len(data.losses))
    axes.plot(steps, data.losses, color="0.8", linewidth=1.3)
    axes.plot(steps[: data.step + 1], data.losses[: data.step + 1], color=PALETTE[0], linewidth=1.6)
    axes.plot([data.step], [data.losses[data.step]], "o", color=PALETTE[0])
    if data.fooled is not None:
        axes.plot([data.fooled], [data.losses[data.fooled]], "x", color=PALETTE[3], markersize=9, markeredgewidth=2)
    highest = max(float(data.losses.max()), 1e-3)
    axes.set(xlim=(-0.4, len(steps) - 0.6), ylim=(-0.04 * highest, 1.12 * highest), xlabel="step")
    axes.set_title("loss (nats), step by step" + ("" if data.fooled is None else f" (×: fooled at step {data.fooled})"))
    set_ticks(axes)


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
        axes.set_xlim(-0.3, max(net.point.loop for net in data.chains[True]) + 0.3)
    for dropout, nets in data.chains.items():
        places = [(float(net.point.loop), net) for net in nets]
        style: dict[str, Any] = {"linestyle": "-"} if dropout else {"linestyle": ":", "markerfacecolor": "white"}
        for metric in ("clean", pgd, "autoattack"):
            _series(accuracy, places, metric, label=metric_name(metric) if dropout else None, **style)
        measured = [(place, *net.llm) for place, net in places if net.llm is not None]
        if measured:
            place, mean, error = (np.array(column) for column in zip(*measured, strict=True))
            style |= {"color": PALETTE[7], "marker": "o", "markersize": 4.5}
            llm.plot(place, mean, label="with head dropout" if dropout else "without", **style)
            llm.vlines(place, mean - 1.96 * error, mean + 1.96 * error, PALETTE[7], linewidth=0.8)
    accuracy.set(ylim=(0, 103), ylabel="accuracy (%)")
    accuracy.set_title(f"{_chain_name(data)}, ε = {data.state.params.radius} (dotted: no dropout)")
    if accuracy.get_legend_handles_labels()[0]:
        accuracy.legend(loc="lower right", bbox_to_anchor=(1, 0.12))  # above curves near 0
    llm.set_ylim(bottom=0)
    llm.set_ylabel(f"LLM (nats, mean over {data.state.params.llm_images} images)")
    llm.set_title("Local linearity (0: linear)")
    if llm.get_legend_handles_labels()[0]:
        llm.legend(loc="upper left")
    else:
        _note(llm, "not measured")
    for axes in (accuracy, llm):
        set_ticks(axes, grid=True)
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
    text = f"cosine of the two\ninput gradients:\n{maps.cosine:.3f} at this image,\n{maps.mean_cosine:.3f} on average\n"
    text += f"over {maps.images} images\n\nred: a brighter pixel\nraises the loss"
    corner = panels[0, 1].get_position(figure)
    figure.text(corner.x0 + 0.01, corner.y1, text, va="top", fontsize=8.5)


# ---- one image ----


def _draw_one_image(figure: Figure, data: OneImage) -> None:
    if data.image is None or data.surfaces is None:
        axes = figure.add_subplot()
        _note(axes, "The chosen net or its teacher is not in the store.")
        _bare(axes)
        return
    figure.subplots_adjust(left=0.012 if data.cloud is None else 0.045, right=0.925, bottom=0.115, top=0.87)
    grid = figure.add_gridspec(1, 5, width_ratios=(0.58, 0.8, 0.12, 1.2, 1.2), wspace=0.24)
    rows = GridSpecFromSubplotSpec(2, 1, grid[0], hspace=0.25)
    picture = figure.add_subplot(grid[0] if data.cloud is None else rows[0])
    picture.imshow(data.image, cmap="gray", vmin=0, vmax=1)
    picture.set_title(f"image {data.state.image}, label {data.label}")
    _bare(picture)
    if data.cloud is not None:
        _draw_cloud(figure.add_subplot(rows[1]), data, data.cloud)
    _draw_bound(figure.add_subplot(grid[1]), data)
    highest = max(float(surface.loss.max()) for surface in data.surfaces)
    student, teacher = data.surfaces
    left, right = figure.add_subplot(grid[3]), figure.add_subplot(grid[4])
    _draw_surface(left, student, data.state.epsilon, highest)
    _draw_surface(right, teacher, data.state.epsilon, highest)
    left.set_title(data.chosen.label)
    left.set_ylabel("along random signs (pixels)")
    right.set_title(data.teacher_name.removeprefix("the "))
    right.yaxis.set_major_locator(NullLocator())
    for axes in (left, right):
        set_ticks(axes, left=0.46)
    scale = figure.add_axes((0.978, 0.185, 0.012, 0.615))
    place: dict[str, Any] = {"origin": "lower", "extent": (0, 1, 0, highest or 1)}
    scale.imshow(np.linspace(0, 1, 256)[:, None], cmap="cividis", aspect="auto", **place)
    scale.set_ylabel("cross-entropy (nats)")
    scale.xaxis.set_major_locator(NullLocator())
    set_ticks(scale)


def _draw_cloud(axes: Axes, data: OneImage, cloud: Array) -> None:
    """Gap and bound of all test images, and of this one."""
    # Logarithms on plain axes: matplotlib's log axes take several times as long.
    here, least = np.array([data.gap, sum(data.terms.values())]), 1e-3
    every, this = (np.log10(np.maximum(values, least)) for values in (cloud, here))
    axes.plot(*every, ".", color=GREY, markersize=2.5, alpha=0.5)
    axes.plot(*this, "o", color=PALETTE[4], markersize=7)
    reach = np.log10(least) - 0.2, max(every.max(), this.max()) + 0.2
    axes.plot(reach, reach, color="black", linewidth=0.8, linestyle="--")
    axes.set(xlim=reach, ylim=reach, aspect="equal", xlabel="gap (nats)")
    axes.set_title(f"bound, {cloud.shape[1]} images")
    for axis in (axes.xaxis, axes.yaxis):
        name_ticks(axis, {-2.0: "0.01", 0.0: "1"})
    set_ticks(axes)


def _draw_bound(axes: Axes, data: OneImage) -> None:
    base = 0.0
    for index, (name, value) in enumerate(data.terms.items()):
        axes.bar(0, value, 0.6, bottom=base, color=PALETTE[index], label=name)
        base += value
    axes.bar(1, data.gap, 0.6, color=GREY)
    name_ticks(axes.xaxis, {0.0: f"bound\n{base:.3g}", 1.0: f"measured gap\n{data.gap:.3g}"})
    axes.set_ylabel("nats")
    axes.set_ylim(0, max(base, data.gap) * 1.42 or 1)
    axes.legend(loc="upper left", ncols=1, handlelength=1.2, labelspacing=0.3, reverse=True)
    axes.set_title(f"Proposition 2, ε = {radius_text(data.state.epsilon)}")
    set_ticks(axes, left=0.26)


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
    """The numbers of a view, for readers without a kernel and for screen readers."""
    match data:
        case Glance():
            known = {name: facet for name, facet in data.facets.items() if facet is not None}
            return pd.DataFrame.from_dict(
                {name: _facet_line(data, facet) for name, facet in known.items()}, orient="index"
            )
        case TradeOff() | UnderAttack():
            return _accuracy_table(data.nets)
        case Film():
            answers = [data.state.class_name(int(belief.argmax())) for belief in data.beliefs[1:]]
            lines = {"loss (nats)": [f"{loss:.3f}" for loss in data.losses], "answer": answers}
            return pd.DataFrame(lines).rename_axis("step")
        case Loops():
            return _accuracy_table([net for nets in data.chains.values() for net in nets])
        case OneImage():
            terms = data.terms | ({"bound": sum(data.terms.values()), "measured gap": data.gap} if data.terms else {})
            return pd.DataFrame({"nats": {name: f"{value:.3f}" for name, value in terms.items()}})


def _facet_line(data: Glance, facet: Facet) -> dict[str, str]:
    radius = "none" if facet.smallest is None else radius_text(facet.smallest)
    answers = [f"{data.state.class_name(int(one.argmax()))} ({100 * one.max():.0f} %)" for one in facet.beliefs]
    headings = "clean answer", f"answer, attacked at ε = {radius_text(data.state.epsilon)}"
    return {"‖gradient‖₂": f"{facet.norm:.3g}", "smallest ε that fools it": radius} | dict(
        zip(headings, answers, strict=True)
    )


def _accuracy_table(nets: Sequence[NetView]) -> pd.DataFrame:
    lines: dict[str, dict[str, str]] = {}
    for net in nets:
        if net.trained:
            lines[net.label] = {
                metric_name(metric): f"{value.percent:.1f} [{value.low:.1f}, {value.high:.1f}]"
                for metric, value in net.accuracies.items()
            }
            if net.llm is not None:
                lines[net.label]["LLM (nats)"] = f"{net.llm[0]:.3f}"
    return pd.DataFrame.from_dict(lines, orient="index").fillna("–")
