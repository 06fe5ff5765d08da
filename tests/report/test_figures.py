"""What figures share: labels that hide nothing."""

from itertools import combinations

import matplotlib.pyplot as plt
import numpy as np
import pytest

from kdiga_nb.report.figures import label_points, one_panel
from kdiga_nb.report.study_figures import weight_labels


def test_labels_of_points_stay_apart_and_off_the_lines() -> None:
    figure, axes = one_panel(6, 4)
    xs, ys = [1.0, 1.1, 1.2, 5.0], [1.0, 1.05, 1.0, 4.0]
    axes.plot(xs, ys, "o-")
    label_points(axes, [(word, x, y, "0.2") for word, x, y in zip(("one", "two", "three", "ten"), xs, ys, strict=True)])
    boxes = [text.get_window_extent() for text in axes.texts]
    assert sorted(text.get_text() for text in axes.texts) == ["one", "ten", "three", "two"]
    assert not any(one.overlaps(two) for one, two in combinations(boxes, 2))
    path = axes.transData.transform(np.column_stack([np.linspace(1.2, 5, 200), np.linspace(1, 4, 200)]))
    frame = axes.get_window_extent()
    for box in boxes:
        assert not any(box.contains(*point) for point in path)
        assert frame.contains(box.x0, box.y0) and frame.contains(box.x1, box.y1)
    plt.close(figure)


def test_a_label_stands_nearest_to_its_own_point() -> None:
    """Three points closer together than a label is wide, above them the frame: the CIFAR-10 nets under PGD-20."""
    figure, axes = one_panel(10.2, 4.8)
    points = {"10": (75.0, 44.5), "3": (75.9, 44.3), "1": (77.5, 42.7), "0.3": (80.7, 35.5)}
    axes.plot(*zip(*points.values(), strict=True), "*-", markersize=10)
    axes.plot([90, 30], [0, 47], "o", linestyle="none")
    label_points(axes, [(text, *point, "0.2") for text, point in points.items()])
    places = {text: axes.transData.transform(point) for text, point in points.items()}
    for label in axes.texts:
        box = label.get_window_extent()
        centre = np.array([box.x0 + box.x1, box.y0 + box.y1]) / 2
        assert min(places, key=lambda text: float(np.linalg.norm(places[text] - centre))) == label.get_text()
    plt.close(figure)


@pytest.mark.parametrize(
    ("points", "labels"),
    [
        ({1.0: (50.0, 9.0)}, ["1"]),
        ({10.0: (80.0, 1.0), 0.1: (80.0, 0.0), 1.0: (81.0, 0.0)}, ["0.1 to 10"]),
        ({0.1: (80.0, 0.0), 1.0: (70.0, 9.0), 3.0: (80.0, 0.0)}, ["0.1", "1", "3"]),
        ({0.1: (80.0, 0.0), 1.0: (np.nan, np.nan), 3.0: (80.0, 0.0)}, ["0.1 to 3"]),
        ({0.1: (np.nan, 0.0)}, []),
    ],
    ids=["one", "one place", "back again", "one not measured", "none measured"],
)
def test_weights_that_share_a_place_share_a_label(points: dict[float, tuple[float, float]], labels: list[str]) -> None:
    assert [text for text, _, _ in weight_labels(points)] == labels
