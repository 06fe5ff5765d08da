"""The explorable page: digits nets, test images and published accuracies in one HTML file that needs no server.

``report/page/`` has its parts: ``explorable.js`` (nets, input gradient and PGD in plain JavaScript), ``page.js``,
``page.css`` and the text.
"""

import base64
import json
from pathlib import Path
from string import Template
from typing import Any

import pandas as pd
from torch import Tensor, nn

from kdiga_nb import __version__, paths
from kdiga_nb.artifacts.explore import Point, explored
from kdiga_nb.artifacts.table import Nets
from kdiga_nb.data import load_data
from kdiga_nb.models import Normalize
from kdiga_nb.params import ExploreParams, at_scale
from kdiga_nb.report.colors import method_color
from kdiga_nb.runs import StoreError
from kdiga_nb.runs.run import Run, run_key
from kdiga_nb.runs.store import damage, is_finished, load_or_train

PARTS = Path(__file__).parent / "page"
PER_CLASS = 3  # test images of each class
COLUMNS = {
    "st": ("ST", "standard training"),
    "kd": ("KD", "distilled from the teacher"),
    "kdiga": ("KDIGA", ""),
    "isd_wot": ("ISD-WoT", ""),
    "penalty": ("gradient penalty", "no teacher, small input gradients"),
    "trades_teacher": ("TRADES teacher", "larger, trained on attacked images"),
}
CURVES = {
    "st": "ST",
    "kd": "KD",
    "kdiga_1_5": "KDIGA, λ = 1.5",
    "penalty": "gradient penalty",
    "isd_wot_1": "ISD-WoT, loop 1",
    "trades_student": "TRADES student",
}


def layers(model: nn.Module, side: int) -> list[dict[str, Any]]:
    """A net of ``Normalize``, convolutions, BatchNorm, GELU, 2×2 pooling and a linear head, as plain values for JSON.

    BatchNorm is folded into the convolution before it; weights are base64 of little-endian float32.

    Args:
        model: a ``DigitsCNN`` in eval mode.
        side: height and width of its images.

    Raises:
        ValueError: the net has another kind of layer.
    """
    found: list[dict[str, Any]] = []
    for module in (*model.get_submodule("features").children(), model.get_submodule("head")):
        if isinstance(module, Normalize):
            found.append({"kind": "normalize", "mean": module.mean.item(), "std": module.std.item()})
        elif isinstance(module, nn.Conv2d):
            found.append(_convolution(module, side) | {"folded": module})
            side = (side + 2 * found[-1]["padding"] - found[-1]["size"]) // found[-1]["stride"] + 1
        elif isinstance(module, nn.BatchNorm2d):
            found[-1] |= _weights(*_folded(found[-1]["folded"], module))
        elif isinstance(module, nn.GELU):
            found.append({"kind": "gelu"})
        elif isinstance(module, nn.AvgPool2d) and module.kernel_size == 2:
            found.append({"kind": "pool", "side": side})
            side //= 2
        elif isinstance(module, nn.Linear):
            found.append({"kind": "linear"} | _weights(module.weight, module.bias))
        elif not isinstance(module, nn.Flatten):
            raise ValueError(f"the page cannot compute a {type(module).__name__}")
    return [{key: value for key, value in layer.items() if key != "folded"} for layer in found]


def _convolution(layer: nn.Conv2d, side: int) -> dict[str, Any]:
    shape = {"channels": layer.in_channels, "filters": layer.out_channels, "size": layer.kernel_size[0]}
    return {"kind": "convolution", "side": side, "stride": layer.stride[0], "padding": int(layer.padding[0])} | shape


def _folded(convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    assert norm.running_mean is not None and norm.running_var is not None
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    shift = norm.bias.double() - norm.running_mean.double() * scale
    return convolution.weight.double() * scale[:, None, None, None], shift


def _weights(weight: Tensor, bias: Tensor) -> dict[str, str]:
    parts = {"weight": weight, "bias": bias}
    return {
        name: base64.b64encode(part.detach().float().numpy().astype("<f4").tobytes()).decode()
        for name, part in parts.items()
    }


def explorable(scale: str = "digits") -> str:
    """The page for a scale of digits nets, from the run store (nets) and the published tables (accuracies).

    Raises:
        StoreError: the store lacks a net; the message says which command makes it.
    """
    params = at_scale(ExploreParams, scale)
    lambdas = sorted({params.lambda_iga, *params.sweep})
    points = {"st": Point("st"), "kd": Point("kd"), "penalty": Point("penalty")}
    points |= {f"kdiga_{place}": Point("kdiga", weight) for place, weight in enumerate(lambdas)}
    points |= {f"isd_wot_{loop}": Point("isd_wot", loop=loop) for loop in range(1, params.loops + 1)}
    nets: dict[str, Nets] = {name: explored(params, point).runs for name, point in points.items()}
    kd = nets["kd"][0]
    assert isinstance(kd, Run) and kd.teacher is not None
    nets["trades_teacher"] = (kd.teacher,)
    split = load_data(params.dataset).test
    chosen = [int(place) for label in range(10) for place in (split.labels == label).nonzero().flatten()[:PER_CLASS]]
    side = split.images.shape[-1]
    data = {
        "side": side,
        "digits": [
            {"pixels": [round(value, 6) for value in split.images[i].flatten().tolist()], "label": int(split.labels[i])}
            for i in chosen
        ],
        "nets": {name: layers(_net(runs[0], scale), side) for name, runs in nets.items()},
        "lambdas": lambdas,
        "lambda": params.lambda_iga,
        "loops": params.loops,
        "columns": [
            {"id": key, "name": name, "what": what, "color": method_color(key)} for key, (name, what) in COLUMNS.items()
        ],
        **_curves(scale, params),
    }
    return _filled(scale, data)


def _net(run: Any, scale: str) -> nn.Module:
    if not is_finished(run) or (isinstance(run, Run) and damage(run) is not None):
        lacks = f"the run store has no whole net {run_key(run)}" if isinstance(run, Run) else str(run)
        raise StoreError(f"{lacks}: kdiga store pull {scale}, or kdiga reproduce --scale {scale} --only explore")
    return load_or_train(run, device="cpu")


def _number(table: pd.DataFrame, row: str, metric: str, column: str = "value") -> float:
    return float(table.loc[(table["row"] == row) & (table["metric"] == metric), column].iloc[0])


def _curves(scale: str, params: ExploreParams) -> dict[str, Any]:
    """Published accuracies against ε, and the sentence that says them to a reader who does not see the picture."""
    table = pd.read_csv(paths.published(scale) / "explore.csv")
    metrics = {0.0: "clean", params.epsilon: f"pgd{params.pgd_steps}"}
    metrics |= {radius: f"pgd{params.pgd_steps}@{radius:g}" for radius in params.radii}
    curves, words = [], []
    for row, name in CURVES.items():
        points = [
            {"epsilon": epsilon} | {key: _number(table, row, metrics[epsilon], key) for key in ("value", "low", "high")}
            for epsilon in sorted(metrics)
        ]
        curves.append({"name": name, "color": method_color(row), "points": points})
        words.append(f"{name} {_number(table, row, metrics[params.epsilon]):.0f} %")
    return {"curves": curves, "curveText": f"Accuracy falls with ε. At ε = {params.epsilon:g}: {', '.join(words)}."}


def _filled(scale: str, data: dict[str, Any]) -> str:
    def part(name: str) -> str:
        return (PARTS / name).read_text(encoding="utf-8")

    values = {
        "css": part("page.css"),
        "script": f"{part('explorable.js')}\n{part('page.js')}",
        "data": json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("</", "<\\/"),
        "count": len(data["nets"]),
        "images": len(load_data(at_scale(ExploreParams, scale).dataset).test.labels),
        "findings": "\n".join(f"<p>{sentence}</p>" for sentence in _findings(scale)),
        "version": __version__,
        "scale": scale,
    }
    return Template(part("explorable.html")).substitute(values)


def _findings(scale: str) -> tuple[str, ...]:
    """Sentences with the published numbers of Table 1, as HTML."""
    table, photographs = (pd.read_csv(paths.published(name) / "table1.csv") for name in (scale, "cifar10_cpu"))
    rows = ("st", "kd", "kdiga", "kdiga_zero", "penalty", "isd_wot_1", "trades_teacher")
    pgd = {row: _number(table, row, "pgd20") for row in rows}
    loops = {column: _number(photographs, "isd_wot_6", "pgd20", column) for column in ("value", "reported")}
    return (
        f"<b>KDIGA passes robustness on, plain distillation little of it.</b> Under PGD-20 the teacher reads "
        f"{pgd['trades_teacher']:.0f} % of the digits, KD {pgd['kd']:.0f} % and KDIGA {pgd['kdiga']:.0f} %.",
        f"<b>Most of that is a small gradient.</b> With the teacher's gradient replaced by zero, KD still gains "
        f"{pgd['kdiga_zero'] - pgd['kd']:.0f} of KDIGA's {pgd['kdiga'] - pgd['kd']:.0f} points. A gradient penalty "
        f"without any teacher has {pgd['penalty']:.0f} %.",
        f"<b>Self-distillation gains with its first loop.</b> From {pgd['st']:.0f} % (ST) to {pgd['isd_wot_1']:.0f} %; "
        f"the later loops add nothing here. On the photographs of CIFAR-10 six loops reach {loops['value']:.0f} %, "
        f"where the paper reports {loops['reported']:.0f} %.",
    )
