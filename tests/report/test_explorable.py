"""The explorable page: its mathematics against PyTorch in a real browser, its controls by mouse and keyboard."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from kdiga_nb import paths
from kdiga_nb.attacks.gradient import PGD
from kdiga_nb.cli import app
from kdiga_nb.data import load_data
from kdiga_nb.losses import input_gradient
from kdiga_nb.models import build_model
from kdiga_nb.report import explorable
from kdiga_nb.runs import StoreError, shipped

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next((path for name in BROWSERS if (path := shutil.which(name))), "")
IMAGE = (1, 8, 8)
LIMIT = 1_500_000  # bytes

needs_browser = pytest.mark.skipif(not CHROMIUM, reason="no chromium on this machine (apt-get install chromium)")


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page, made from the published nets."""
    home = tmp_path_factory.mktemp("explorable")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KDIGA_RUNS", str(home / "runs"))
        shipped.pull("digits")
        result = CliRunner().invoke(app, ["explorable", str(home / "page.html")])
    assert result.exit_code == 0, result.output
    return home / "page.html"


def opened(file: Path, errors: list[str], **options: Any) -> Iterator[Any]:
    driver = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (pip install -e .[test])")
    with driver.sync_playwright() as started:
        arguments = ["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"]
        browser = started.chromium.launch(executable_path=CHROMIUM, args=arguments)
        page = browser.new_page(**options)
        page.on(
            "console", lambda message: errors.append(message.text) if message.type in ("error", "warning") else None
        )
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", lambda request: errors.append(request.url) if request.url.startswith("http") else None)
        page.goto(file.as_uri())
        page.locator(".verdict").first.wait_for()
        yield page
        browser.close()
    assert errors == []


@pytest.fixture
def page(page_file: Path) -> Iterator[Any]:
    yield from opened(page_file, [], viewport={"width": 1280, "height": 900})


def random_net(name: str, seed: int) -> torch.nn.Module:
    """A net whose BatchNorm statistics and weights are no defaults."""
    torch.manual_seed(seed)
    net = build_model(name, num_classes=10, image_shape=IMAGE)
    with torch.no_grad():
        for value in (*net.parameters(), *net.buffers()):
            if value.is_floating_point() and value.dim() == 1:
                value.copy_(torch.rand_like(value) + 0.5)
    return net.eval()


# ---- the file ----


def test_the_page_is_one_small_file_that_loads_nothing(page_file: Path) -> None:
    text = page_file.read_text(encoding="utf-8")
    assert len(text.encode()) < LIMIT
    assert re.findall(r"""(?:src|href)\s*=\s*["'](?!data:)[^"']+""", text) == []
    assert "$" not in re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL)


def test_the_committed_page_has_the_texts_and_numbers_of_now(page_file: Path) -> None:
    """``make publish SCALE=digits`` writes the page; its weights may be those of another run of the same trainings."""
    weights = re.compile(r'"(weight|bias)":"[^"]*"')
    committed = paths.published("digits") / "explorable.html"
    now, then = (weights.sub("", file.read_text(encoding="utf-8")) for file in (page_file, committed))
    assert now == then


def test_a_store_without_nets_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KDIGA_RUNS", str(tmp_path / "empty"))
    with pytest.raises(
        StoreError, match=r"no whole net .*: kdiga store pull digits, or kdiga reproduce .* --only explore"
    ):
        explorable.explorable("digits")
    result = CliRunner().invoke(app, ["explorable", str(tmp_path / "page.html")])
    assert result.exit_code == 1 and len(result.output.splitlines()) == 1
    assert not (tmp_path / "page.html").exists()


def test_a_net_that_the_page_cannot_compute_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot compute a ReLU"):
        explorable.layers(build_model("digits_mlp", num_classes=10, image_shape=IMAGE), 8)


# ---- the mathematics ----


@needs_browser
@pytest.mark.parametrize(("name", "seed"), [("digits_small", 0), ("digits_small", 1), ("digits_wide", 2)])
def test_logits_gradients_and_attacked_images_are_those_of_pytorch(page: Any, name: str, seed: int) -> None:
    net = random_net(name, seed)
    split = load_data("digits").test
    x, y = split.images[:6].double(), split.labels[:6]
    made = page.evaluate(
        """([layers, images, labels, epsilon]) => {
            const net = ready(layers);
            return images.map((image, i) => [
                Array.from(logits(net, image)), Array.from(inputGradient(net, image, labels[i])),
                Array.from(attacked(net, image, labels[i], epsilon)),
            ]);
        }""",
        [explorable.layers(net, 8), x.flatten(1).tolist(), y.tolist(), 0.1],
    )
    net = net.double()
    gradient, values = input_gradient(net, x, y)
    moved = PGD(0.1, 0.01, 20, random_start=False)(net, x, y)
    for place, expected in enumerate((values, gradient, moved)):
        found = torch.tensor([one[place] for one in made], dtype=torch.float64)
        torch.testing.assert_close(found, expected.detach().flatten(1), atol=1e-4, rtol=1e-4)


@needs_browser
def test_the_normal_distribution_is_exact(page: Any) -> None:
    x = torch.linspace(-9, 9, 2001, dtype=torch.float64)
    found = torch.tensor(page.evaluate("x => x.map(normal)", x.tolist()), dtype=torch.float64)
    torch.testing.assert_close(found, torch.special.ndtr(x), atol=1e-10, rtol=0)


@needs_browser
def test_the_smallest_epsilon_fools_and_a_smaller_one_does_not(page: Any) -> None:
    found = page.evaluate(
        """() => DATA.digits.slice(0, 5).map(({pixels, label}) => {
            const fooled = (e) => best(logits(net("kd"), attacked(net("kd"), pixels, label, e))) !== label;
            const radius = smallestEpsilon(net("kd"), pixels, label);
            return radius && [fooled(radius), fooled(radius - 1 / 512)];
        })"""
    )
    assert [pair for pair in found if pair not in (0, None)] == [[True, False]] * len(found)


# ---- the controls ----


def texts(page: Any, part: str) -> list[str]:
    return page.locator(f".{part}").all_text_contents()


@needs_browser
def test_epsilon_by_keyboard_decides_who_holds(page: Any) -> None:
    slider = page.locator("#epsilon")
    slider.focus()
    page.keyboard.press("Home")
    assert page.locator("#epsilon-value").text_content() == "0.00"
    assert {text.split(":")[0] for text in texts(page, "verdict")} == {"✓ holds"}
    page.keyboard.press("End")
    assert page.locator("#epsilon-value").text_content() == "0.30"
    assert "✗ fooled" in {text.split(":")[0] for text in texts(page, "verdict")}
    assert "At ε = 0.30: ST says" in page.locator("#summary").text_content()


@needs_browser
def test_epsilon_by_mouse_is_drawn_at_every_step(page: Any) -> None:
    box = page.locator("#epsilon").bounding_box()
    middle = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + box["width"] / 3, middle)
    page.mouse.down()
    shown = []
    for share in (0.2, 0.4, 0.6, 0.8):
        page.mouse.move(box["x"] + share * box["width"], middle)
        shown.append(float(page.locator("#epsilon-value").text_content()))
    page.mouse.up()
    assert shown == sorted(set(shown)) and shown[0] < 0.1 < shown[-1]


@needs_browser
def test_weight_and_loop_change_their_nets_alone(page: Any) -> None:
    before = texts(page, "title"), page.locator(".bars").evaluate_all("bars => bars.map(bar => bar.innerHTML)")
    page.locator("#lambda").press("End")
    page.locator("#loop").press("End")
    after = texts(page, "title"), page.locator(".bars").evaluate_all("bars => bars.map(bar => bar.innerHTML)")
    assert [
        place
        for place, pair in enumerate(zip(*(side[0] for side in (before, after)), strict=True))
        if len(set(pair)) > 1
    ] == [2, 3]
    assert [
        place
        for place, pair in enumerate(zip(*(side[1] for side in (before, after)), strict=True))
        if len(set(pair)) > 1
    ] == [2, 3]
    assert after[0][2:4] == ["KDIGA, λ = 32", "ISD-WoT, loop 6"]


@needs_browser
def test_digits_are_picked_by_mouse_and_arrow_keys(page: Any) -> None:
    page.locator("#digits button").nth(10).click()
    assert page.locator("#digits [aria-checked=true]").get_attribute("aria-label") == "digit 3, image 11 of 30"
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert page.locator("#drawing-says").text_content() == "The image is a 4."
    page.locator(".radius").last.filter(has_text=re.compile("ε|wrong")).wait_for()
    page.locator(".tally").last.filter(has_text="of the 30 digits").wait_for()


@needs_browser
def test_a_digit_is_drawn_by_mouse_and_by_keyboard(page: Any) -> None:
    page.locator("#clear").click()
    ink = "() => state.image.reduce((sum, value) => sum + value, 0)"
    assert page.evaluate(ink) == 0
    box = page.locator("#pad").bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.5, box["y"] + box["height"] * 0.1)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.5, box["y"] + box["height"] * 0.9, steps=12)
    page.mouse.up()
    drawn = page.evaluate(ink)
    assert drawn > 5 and "counts as" in page.locator("#drawing-says").text_content()
    page.locator("#pad").focus()
    for key in ("ArrowLeft", "ArrowLeft", "Space"):
        page.keyboard.press(key)
    assert page.evaluate(ink) > drawn
    page.locator("#drawing-label").select_option("1")
    assert page.locator("#drawing-says").text_content() == "Your digit counts as a 1."


# ---- every screen and every reader ----


@needs_browser
@pytest.mark.parametrize("width", [360, 820, 1280])
def test_nothing_is_wider_than_the_screen(page_file: Path, width: int) -> None:
    for page in opened(page_file, [], viewport={"width": width, "height": 740}):
        assert page.evaluate("document.documentElement.scrollWidth") <= width


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_ground(page_file: Path, scheme: str) -> None:
    """WCAG's contrast of at least 4.5, for the colours of text on the card and on the page."""
    for page in opened(page_file, [], color_scheme=scheme):
        names = ["text", "quiet", "good", "bad", "card", "back"]
        colors = page.evaluate(
            """(names) => names.map((name) => {
                const probe = document.createElement("i");
                probe.style.color = `var(--${name})`;
                document.body.append(probe);
                return getComputedStyle(probe).color.match(/\\d+/g).map(Number);
            })""",
            names,
        )
        light = {}
        for name, color in zip(names, colors, strict=True):
            linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in color)]
            light[name] = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
        for text in ("text", "quiet", "good", "bad"):
            for ground in ("card", "back"):
                low, high = sorted((light[text], light[ground]))
                assert (high + 0.05) / (low + 0.05) >= 4.5, (text, ground)


@needs_browser
def test_pictures_have_words_and_motion_can_be_off(page_file: Path) -> None:
    for page in opened(page_file, [], reduced_motion="reduce"):
        unnamed = page.locator("canvas:not([aria-label]):not([aria-hidden]), svg:not([aria-label])").count()
        assert unnamed == 0
        durations = page.locator(".bars i, .scale i").evaluate_all(
            "all => all.map(i => getComputedStyle(i).transitionDuration)"
        )
        assert set(durations) == {"0s"}
        data = json.loads(page.locator("#data").text_content())
        assert len(data["digits"]) == 30 and len(data["curves"]) == 6
