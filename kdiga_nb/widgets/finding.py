"""Find a test image worth looking at: what PGD did to KD and KDIGA is in the store, image by image."""

import torch

from kdiga_nb.artifacts.explore import Point
from kdiga_nb.data import load_data
from kdiga_nb.measures import TestAccuracy
from kdiga_nb.runs.store import measured
from kdiga_nb.widgets.views import State, stored_net

FINDS = {
    "random": "Random image",
    "kd_only": "KD fooled, KDIGA not",
    "both": "Both fooled",
    "margin": "Smallest margin",
}
MOST = 2000  # images whose margin is looked at
SHOWN = 12  # images that a search offers


def find(state: State, kind: str, draw: int = 0) -> tuple[list[int], str]:
    """Test images of that kind, at most ``SHOWN``, the best first, and a sentence; no image if there is none.

    ``kd_only`` and ``both`` read the masks of the stored evaluation PGD at the radius of the parameters, for the chosen
    seed and weight, and give the images after the chosen one, cyclically. ``margin`` gives the images on which the
    KDIGA net's logit of the true class leads by least, among the first ``MOST`` that the net classifies correctly.

    Args:
        kind: a key of ``FINDS``.
        draw: decides the random images.
    """
    total = len(load_data(state.params.dataset).test.labels)
    if kind == "random":
        generator = torch.Generator().manual_seed(draw)
        return torch.randperm(total, generator=generator)[:SHOWN].tolist(), f"From {total} test images."
    kdiga = Point("kdiga", state.lambda_iga)
    if kind == "margin":
        return _smallest_margins(state, kdiga)
    masks = [_mask(state, point) for point in (Point("kd"), kdiga)]
    if masks[0] is None or masks[1] is None:
        return [], "The store has no PGD measurement of KD and of KDIGA with this weight and seed."
    wanted = ("0", "1") if kind == "kd_only" else ("0", "0")
    found = [i for i, pair in enumerate(zip(*masks, strict=True)) if pair == wanted]
    words = "KD is fooled and KDIGA holds" if kind == "kd_only" else "both are fooled"
    at = f"under the stored PGD at ε = {state.params.radius}"
    if not found:
        return [], f"There is no test image on which {words} {at}."
    found.sort(key=lambda image: (image <= state.image, image))
    return found[:SHOWN], f"{len(found)} of {len(masks[0])} test images: {words} {at}."


def _mask(state: State, point: Point) -> str | None:
    row = state.row(point)
    for cell in row.cells:
        if cell.metric == f"pgd{state.params.pgd_steps}":
            job = cell.jobs[0]
            assert isinstance(job.measure, TestAccuracy)
            result = measured(job.run, job.measure)
            return None if result is None else result.get("survivors")
    return None


def _smallest_margins(state: State, point: Point) -> tuple[list[int], str]:
    data = load_data(state.params.dataset)
    model = stored_net(state.row(point).runs[0], data.image_shape)
    if model is None:
        return [], "The store has no KDIGA net with this weight and seed."
    x, y = data.test.images[:MOST].to("cpu"), data.test.labels[:MOST]
    with torch.no_grad():
        logits = torch.cat([model(part) for part in x.split(500)])
    true = logits.gather(1, y[:, None]).squeeze(1)
    margin = true - logits.scatter(1, y[:, None], -torch.inf).amax(1)
    margin[margin <= 0] = torch.inf
    least = margin.argsort()[: min(SHOWN, int(margin.isfinite().sum()))].tolist()
    if not least:
        return [], "KDIGA classifies none of the test images correctly."
    return least, f"KDIGA's logit of the true class leads by {margin[least[0]].item():.2f} nats, the least of {len(y)}."
