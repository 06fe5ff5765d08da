"""The explorer in a real browser: Debian's chromium drives real JupyterLab and real Voilà on this machine.

Skipped, by name, where there is no chromium, playwright or Voilà. What the pages looked like is left in
``build/browser``.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import papermill
import pytest

from kdiga_nb import paths, runs
from kdiga_nb.artifacts.explore import Point, explored
from kdiga_nb.params import ExploreParams

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (pip install -e .[test])")
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next((path for name in BROWSERS if (path := shutil.which(name))), "")
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no chromium on this machine (apt-get install chromium)")

SHOTS = paths.ROOT / "build" / "browser"
PATIENCE = 150_000  # milliseconds for one step of a page; a busy machine starts a kernel slowly
TOKEN = "t"


@pytest.fixture
def served(small: ExploreParams, tmp_path: Path) -> Path:
    """A folder with a copy of the notebook at the small settings."""
    return serve(small, tmp_path / "served")


def serve(params: ExploreParams, home: Path) -> Path:
    home.mkdir()
    notebook, values = paths.NOTEBOOKS / "explore.ipynb", params.model_dump()
    papermill.execute_notebook(notebook, home / "explore.ipynb", values, prepare_only=True, progress_bar=False)
    return home


@contextmanager
def server(command: list[str], home: Path, runs_home: Path, url: str) -> Iterator[None]:
    """A server with homes of its own, until the block ends."""
    own = {name: str(home / name.lower()) for name in ("HOME", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "IPYTHONDIR")}
    own |= {"JUPYTER_RUNTIME_DIR": str(home / "runtime"), "KDIGA_RUNS": str(runs_home), "PYTHONWARNINGS": "ignore"}
    own |= {"KDIGA_FIGURES": str(home / "figures"), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(paths.ROOT)}
    with (home / "server.log").open("w") as log:
        process = subprocess.Popen(command, cwd=home, env=os.environ | own, stdout=log, stderr=subprocess.STDOUT)
        try:
            _wait_for(url, process, home / "server.log")
            yield
        finally:
            process.terminate()
            process.wait(30)


def _wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + PATIENCE / 1000
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except urllib.error.HTTPError:
            return
        except OSError:
            time.sleep(0.25)
    raise AssertionError(f"{url} did not answer:\n{log.read_text()}")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def browser_page() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        arguments = ["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"]
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=arguments)
        page = browser.new_page(viewport={"width": 1320, "height": 1000})
        page.set_default_timeout(PATIENCE)
        try:
            yield page
        finally:
            browser.close()


@contextmanager
def voila_page(served: Path, runs_home: Path) -> Iterator[Any]:
    pytest.importorskip("voila", reason="Voilà is not installed (pip install -e .[page])")
    port = free_port()
    command = [sys.executable, "-m", "voila", "explore.ipynb", "--no-browser", f"--port={port}", "--Voila.ip=127.0.0.1"]
    url = f"http://127.0.0.1:{port}"
    with server(command, served, runs_home, f"{url}/voila/static/voila.js"), browser_page() as page:
        page.goto(url)
        page.locator(".kdiga-explorer img").wait_for()
        yield page


@contextmanager
def lab_page(served: Path, runs_home: Path) -> Iterator[Any]:
    port = free_port()
    # Every cell is in the page, also those that a reader would have to scroll to, and no question lies over it.
    for name, values in {
        "notebook-extension/tracker": {"windowingMode": "none"},
        "apputils-extension/notification": {"fetchNews": "false"},
    }.items():
        path = served / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--ip=127.0.0.1", f"--port={port}", "--allow-root"]
    command += ["--ServerApp.port_retries=0", f"--IdentityProvider.token={TOKEN}", f"--ServerApp.root_dir={served}"]
    command += ["--LabApp.expose_app_in_browser=True", "--LabApp.news_url=", "--LabApp.extension_manager=readonly"]
    command += ["--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
    command += [f"--LabApp.user_settings_dir={served / 'settings'}", f"--LabApp.workspaces_dir={served / 'workspaces'}"]
    url = f"http://127.0.0.1:{port}"
    with server(command, served, runs_home, f"{url}/api"), browser_page() as page:
        page.goto(f"{url}/lab/tree/explore.ipynb?token={TOKEN}&reset")
        run_all_cells(page)
        yield page


def run_all_cells(page: Any, restart: bool = False) -> None:
    """Run the notebook from the top, after restarting its kernel if asked to."""
    page.wait_for_function("window.jupyterapp?.shell?.currentWidget?.context?.isReady")
    page.evaluate(
        """async restart => {
            const panel = window.jupyterapp.shell.currentWidget;
            await panel.context.ready; await panel.revealed; await panel.context.sessionContext.ready;
            await panel.context.sessionContext.session.kernel.info;
            if (restart) await panel.context.sessionContext.session.kernel.restart();
            await window.jupyterapp.commands.execute('notebook:run-all-cells');
        }""",
        restart,
    )
    page.locator(".kdiga-explorer img").wait_for()


def shown(page: Any) -> tuple[str, str]:
    """The line of text, and where the picture comes from."""
    return page.locator(".kdiga-text").inner_text(), page.locator(".kdiga-explorer img").get_attribute("src")


def slider(page: Any, label: str) -> Any:
    return page.locator(".widget-hslider:visible", has=page.get_by_text(label, exact=True))


def wait_for_text(page: Any, text: str) -> None:
    playwright.expect(page.locator(".kdiga-text")).to_contain_text(text, timeout=PATIENCE)


def wait_for_status(page: Any, text: str) -> None:
    playwright.expect(page.locator(".kdiga-status")).to_contain_text(text, timeout=PATIENCE)


# The name of a view, the label of its slider, and how its line of text begins.
SLIDERS = [
    ("at a glance", "ε", "image .* attacked on each net"),
    ("under attack", "ε", "KDIGA, .* attacked now at "),
    ("one image", "image", "KDIGA, .*image .*, label "),
    ("ISD loops", "loop", "ISD-WoT-"),
    ("λ_IGA", "λ_IGA", "KDIGA, "),
]


def choose_view(page: Any, name: str, text: str) -> None:
    page.locator(".widget-toggle-button", has_text=name).click()
    playwright.expect(page.locator(".kdiga-text")).to_have_text(re.compile(f"^{text}"), timeout=PATIENCE)


def moves_by_key_and_mouse(page: Any, label: str) -> None:
    """Moving a slider either way changes the text and the picture."""
    before = shown(page)
    slider(page, label).get_by_role("slider").press("ArrowRight")
    by_key = wait_for_change(page, before)
    box = slider(page, label).locator(".noUi-base").bounding_box()
    handle = slider(page, label).get_by_role("slider").bounding_box()
    left = handle["x"] + handle["width"] / 2 > box["x"] + box["width"] / 2
    page.mouse.click(box["x"] + (0.25 if left else 0.75) * box["width"], box["y"] + box["height"] / 2)
    wait_for_change(page, by_key)


def wait_for_change(page: Any, before: tuple[str, str]) -> tuple[str, str]:
    deadline = time.monotonic() + PATIENCE / 1000
    while time.monotonic() < deadline:
        now = shown(page)
        if now[0] != before[0] and now[1] != before[1]:
            return now
        page.wait_for_timeout(100)
    raise AssertionError(f"nothing changed: {before[0]}")


def shot(page: Any, name: str) -> None:
    SHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SHOTS / f"{name}.png")


def test_jupyterlab(served: Path, store: Path, small: ExploreParams):
    with lab_page(served, store) as page:
        for view, label, text in SLIDERS:
            choose_view(page, view, text)
            moves_by_key_and_mouse(page, label)
            shot(page, f"lab-{label}")
        assert page.locator(".jp-OutputArea-output [data-mime-type='application/vnd.jupyter.stderr']").count() == 0

        # A point that is not in the store: said so, trained by the button alone, then part of what is shown.
        handle = slider(page, "λ_IGA").get_by_role("slider")
        few = handle.get_attribute("aria-valuemax")
        page.get_by_label("untrained weights too").check()
        playwright.expect(handle).not_to_have_attribute("aria-valuemax", few, timeout=PATIENCE)
        handle.press("Home")
        slider(page, "λ_IGA").get_by_role("slider").press("ArrowRight")
        wait_for_text(page, "λ = 0.125 on digits_small, seed 0, is not in the store")
        row = explored(small.model_copy(update={"seeds": [0]}), Point("kdiga", 0.125))
        assert not runs.is_finished(row.runs[0])
        page.get_by_role("button", name="Train this point").click()
        wait_for_status(page, "Trained and measured")
        wait_for_text(page, "clean")
        assert runs.is_finished(row.runs[0])
        shot(page, "lab-trained")

        # Another is cancelled: nothing of it is shown, and the button offers it again.
        slider(page, "λ_IGA").get_by_role("slider").press("ArrowRight")
        wait_for_text(page, "λ = 0.25 on digits_small, seed 0, is not in the store")
        page.get_by_role("button", name="Train this point").click()
        wait_for_status(page, "Training KDIGA, λ = 0.25, seed 0:")
        page.get_by_role("button", name="Cancel").click()
        wait_for_status(page, "Cancelled: KDIGA, λ = 0.25, seed 0 keeps")
        wait_for_text(page, "is not in the store")
        playwright.expect(page.get_by_role("button", name="Train this point")).to_be_enabled()


def test_after_a_kernel_restart_a_training_goes_on(tmp_path: Path, store: Path, small: ExploreParams):
    params = small.model_copy(update={"isd_epochs": 16, "show_view": "loops"})
    row = explored(params, Point("isd_wot", loop=1))
    with lab_page(serve(params, tmp_path / "served"), store) as page:
        wait_for_text(page, "ISD-WoT-1 on digits_small, seed 0, is not in the store")
        page.get_by_role("button", name="Train this point").click()
        deadline = time.monotonic() + PATIENCE / 1000
        while not (done := runs.epochs_done(row.runs[0])) and time.monotonic() < deadline:
            page.wait_for_timeout(50)
        run_all_cells(page, restart=True)
        assert 0 < done < row.runs[0].schedule.epochs
        assert not runs.is_finished(row.runs[0]), "the training must have ended with its kernel"
        wait_for_text(page, "of 16 epochs are done; training continues from there")
        page.get_by_role("button", name="Train this point").click()
        wait_for_status(page, "Trained and measured")
        assert runs.is_finished(row.runs[0])


def test_voila(served: Path, store: Path):
    with voila_page(served, store) as page:
        for view, label, text in SLIDERS:
            choose_view(page, view, text)
            moves_by_key_and_mouse(page, label)
            shot(page, f"voila-{label}")
        # The last view is that of λ: its net is pinned, and the next one is compared with it.
        page.get_by_role("button", name="Pin this net").click()
        handle = slider(page, "λ_IGA").get_by_role("slider")
        before = shown(page)
        handle.press("ArrowLeft" if float(handle.get_attribute("aria-valuenow")) > 0 else "ArrowRight")
        wait_for_change(page, before)
        page.get_by_text(re.compile(r"Pinned: .* against it: clean [+-]")).wait_for()
        choose_view(page, "ISD loops", "ISD-WoT-")
        slider(page, "loop").get_by_role("slider").press("Home")
        wait_for_text(page, "ISD-WoT-1,")
        page.locator(".widget-play:visible button").first.click()
        wait_for_text(page, "ISD-WoT-2")
        assert page.get_by_text("Traceback").count() == 0


@pytest.mark.parametrize("width", [820, 1280, 1600])
def test_the_first_view_fits_the_page(served: Path, store: Path, width: int):
    with voila_page(served, store) as page:
        page.set_viewport_size({"width": width, "height": 1100})
        choose_view(page, "at a glance", "image .* attacked on each net")
        shot(page, f"voila-glance-{width}")
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        # Another data set that is not here: said so, and nothing else changes.
        before = shown(page)
        scale = page.locator(".widget-dropdown:visible", has=page.get_by_text("scale", exact=True)).locator("select")
        scale.select_option("imagenet")
        wait_for_status(page, "The scale imagenet cannot be shown")
        playwright.expect(scale).to_have_value("smoke")
        assert shown(page) == before
        page.get_by_role("button", name="Save PNG").click()
        with page.expect_download() as download:
            page.get_by_text("Download glance.png").click()
        assert download.value.path().read_bytes().startswith(b"\x89PNG")


def test_voila_on_a_broken_store(served: Path, store: Path, small: ExploreParams):
    row = explored(small.model_copy(update={"seeds": [0]}), Point("kdiga", small.lambda_iga))
    weights = runs.folder(row.runs[0]) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])
    with voila_page(served, store) as page:
        page.locator(".widget-toggle-button", has_text="one image").click()
        wait_for_text(page, "damaged: the weights do not match their sha256")
        shot(page, "voila-broken")
        playwright.expect(page.get_by_role("button", name="Train this point")).to_be_enabled()
        choose_view(page, "ISD loops", "ISD-WoT-1")


def test_voila_on_an_empty_store(served: Path, tmp_path: Path):
    with voila_page(served, tmp_path / "nothing") as page:
        wait_for_status(page, "kdiga reproduce --scale smoke --only explore")
        shot(page, "voila-empty")
        playwright.expect(page.get_by_role("button", name="Train the smallest set")).to_be_enabled()
        assert page.get_by_text("Traceback").count() == 0


def test_a_newcomer_sees_the_published_nets_without_training(tmp_path: Path) -> None:
    pytest.importorskip("voila", reason="Voilà is not installed (pip install -e .[page])")
    port, store = free_port(), tmp_path / "runs"
    command = [sys.executable, "-m", "kdiga_nb", "explore", "--page", "--no-browser", f"--port={port}"]
    url = f"http://127.0.0.1:{port}"
    with server(command, tmp_path, store, f"{url}/voila/static/voila.js"), browser_page() as page:
        page.goto(url)
        page.locator(".kdiga-explorer img").wait_for()
        page.get_by_text("Read from the run store").wait_for()
        page.get_by_role("button", name="KD fooled, KDIGA not").click()
        page.get_by_text(re.compile(r"\d+ of 500 test images: KD is fooled and KDIGA holds")).wait_for()
        page.get_by_role("button", name="attack film").click()
        page.get_by_text("step 0 of 20").wait_for()
        page.locator(".widget-play button").first.click()
        page.get_by_text(re.compile(r"step 20 of 20: .* (fooled from step \d+ on|never fooled)")).wait_for()
        shot(page, "film")
    assert not store.exists() and (tmp_path / "runs-published").is_dir()
    assert "the published ones are shown" in (tmp_path / "server.log").read_text()
