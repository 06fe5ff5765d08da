"""Published runs: packed from a store, checked, and copied into another store without touching what is there."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from typer.testing import CliRunner

from kdiga_nb import paths
from kdiga_nb.artifacts.table import Cell, Experiment, Row
from kdiga_nb.cli import app
from kdiga_nb.data import load_data
from kdiga_nb.measures import TestAccuracy
from kdiga_nb.methods import ST
from kdiga_nb.params import Table1Params, at_scale
from kdiga_nb.report import reproduce
from kdiga_nb.runs import StoreError, shipped
from kdiga_nb.runs.checkpoints import digest_of
from kdiga_nb.runs.graph import Job, run_all
from kdiga_nb.runs.listing import list_store
from kdiga_nb.runs.run import Run, folder, run_key
from kdiga_nb.runs.store import (
    damage,
    halve_weights,
    is_finished,
    is_published,
    load_or_train,
    measure,
    measured,
)
from kdiga_nb.training import Schedule

NET = Run("digits", "digits_small", ST(), Schedule(1, learning_rate=0.05), seed=1)
BARE = Run("digits", "digits_small", ST(), Schedule(1, learning_rate=0.05), seed=2)
MISSING = Run("digits", "digits_small", ST(), Schedule(1, learning_rate=0.05), seed=3)
CLEAN = TestAccuracy(None, 50)


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Two published runs of the scale smoke, one with weights; the store is empty afterwards."""
    monkeypatch.setattr(paths, "ROOT", tmp_path / "kit")
    (tmp_path / "kit").mkdir()
    for run in (NET, BARE):
        load_or_train(run, device="cpu")
        halve_weights(run)
        measure(run, CLEAN, device="cpu")
    assert shipped.pack("smoke", [NET, BARE, MISSING], [NET]) == [run_key(NET), run_key(BARE)]
    monkeypatch.setenv("KDIGA_RUNS", str(tmp_path / "another"))
    return shipped.home_of("smoke")


def test_what_is_packed_comes_back_and_gives_its_number_again(published: Path) -> None:
    assert shipped.faults("smoke") == []
    assert shipped.pull("smoke") == shipped.Pulled(sorted([run_key(NET), run_key(BARE)]), [])
    before = measured(NET, CLEAN)
    assert before is not None and damage(NET) is None
    weights = safetensors.torch.load_file(folder(NET) / "model.safetensors")
    assert weights["head.weight"].dtype == torch.float16 and weights["features.2.running_var"].dtype == torch.float32
    again = CLEAN(load_or_train(NET, device="cpu"), load_data("digits"))
    assert again["survivors"] == before["survivors"]
    assert json.loads((folder(NET) / "run.json").read_text())["published"] == "smoke"
    assert [entry["state"] for entry in list_store()] == ["published", "published"]


def test_what_was_pulled_is_packed_without_its_mark(published: Path) -> None:
    before = (published / run_key(NET) / "run.json").read_bytes()
    shipped.pull("smoke")
    shipped.pack("smoke", [NET, BARE], [NET])
    assert (published / run_key(NET) / "run.json").read_bytes() == before and shipped.faults("smoke") == []


def test_a_run_without_weights_serves_tables_and_is_trained_again_for_its_net(published: Path) -> None:
    shipped.pull("smoke")
    assert is_finished(BARE) and measured(BARE, CLEAN) is not None
    assert damage(BARE) == "its weights are not among the published ones"
    load_or_train(BARE, device="cpu")
    assert damage(BARE) is None and measured(BARE, CLEAN) is None
    assert len(list(paths.runs().glob(f"{run_key(BARE)}.damaged-*"))) == 1


def test_a_new_measurement_of_a_run_without_weights_brings_its_other_measurements_back(published: Path) -> None:
    shipped.pull("smoke")
    more = TestAccuracy(None, 60)
    outcome = run_all([Job(BARE, CLEAN), Job(BARE, more)], workers=1)
    assert not outcome.failed and outcome.cached == 0
    assert measured(BARE, CLEAN) is not None and measured(BARE, more) is not None


def test_a_notebook_counts_published_runs(published: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = Row("st", "ST", (NET,), (Cell("clean", (Job(NET, CLEAN),)),))
    experiment = Experiment("table1", "Table 1", (row,), at_scale(Table1Params, "smoke"))
    shipped.pull("smoke")
    reproduce(experiment)
    assert capsys.readouterr().out == "1 runs of this page are published ones, not trained here\n"


def test_what_the_store_has_is_left_as_it_is(published: Path) -> None:
    folder(NET).mkdir(parents=True)
    (folder(NET) / "mine.txt").write_text("mine")
    pulled = shipped.pull("smoke")
    assert (pulled.copied, pulled.there) == ([run_key(BARE)], [run_key(NET)])
    assert [path.name for path in folder(NET).iterdir()] == ["mine.txt"]
    assert shipped.pull("smoke").copied == []


def test_a_run_that_two_scales_publish_comes_with_the_weights_of_either(published: Path) -> None:
    shipped.pull("smoke")
    assert shipped.pack("other", [NET, BARE], []) == [run_key(NET), run_key(BARE)]
    shipped.drop("smoke")
    shipped.pull("other")
    assert damage(NET) is None and damage(BARE) == "its weights are not among the published ones"
    shipped.drop("other")
    record = shipped.home_of("other") / run_key(NET) / "run.json"  # the same training, other weights
    record.write_text(json.dumps(json.loads(record.read_text()) | {"sha256": "0" * 64}))
    listed = json.loads((shipped.home_of("other") / "manifest.json").read_text())
    listed["files"][f"{run_key(NET)}/run.json"] = digest_of(record)
    (shipped.home_of("other") / "manifest.json").write_text(json.dumps(listed))
    shipped.pull("other")
    assert damage(NET) == "its weights are not among the published ones"


def test_what_was_pulled_is_dropped_and_nothing_else(published: Path) -> None:
    load_or_train(NET, device="cpu")
    shipped.pull("smoke")
    broken = paths.runs() / "0123456789abcdef"
    broken.mkdir()
    (broken / "run.json").write_text("{")
    result = CliRunner().invoke(app, ["store", "drop", "smoke"])
    assert result.output.startswith("1 published runs removed") and shipped.drop("smoke") == []
    assert not folder(BARE).exists() and damage(NET) is None and broken.is_dir()
    load_or_train(BARE, device="cpu")
    assert is_finished(BARE) and not is_published(BARE) and shipped.drop("digits") == []


def test_a_damaged_publication_is_named_and_nothing_is_copied(published: Path) -> None:
    key = run_key(NET)
    with (published / key / "measures.json.gz").open("a") as file:
        file.write(" ")
    (published / key / "history.csv").unlink()
    (published / key / "extra.txt").touch()
    expected = [
        f"{key}/history.csv: is missing",
        f"{key}/measures.json.gz: does not match its sha256",
        f"{key}/extra.txt: is not in the manifest",
    ]
    assert sorted(shipped.faults("smoke")) == sorted(expected)
    with pytest.raises(StoreError, match="does not match its sha256"):
        shipped.pull("smoke")
    assert not paths.runs().exists()
    result = CliRunner().invoke(app, ["store", "verify", "smoke"])
    assert result.exit_code == 1 and f"smoke: {key}/history.csv: is missing" in result.output


@pytest.mark.parametrize(("text", "words"), [("[]", "not a manifest"), ("{", "cannot be read"), (None, "no runs are")])
def test_a_scale_without_a_manifest_says_so(published: Path, text: str | None, words: str) -> None:
    path = published / "manifest.json"
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(StoreError, match=words) as error:
        shipped.pull("smoke")
    assert "\n" not in str(error.value)


def test_a_net_that_was_measured_in_full_precision_is_published_in_full_precision(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    before = measure(NET, CLEAN, device="cpu")
    shipped.pack("smoke", [NET], [NET])
    monkeypatch.setenv("KDIGA_RUNS", str(tmp_path / "another"))
    shipped.pull("smoke")
    assert CLEAN(load_or_train(NET, device="cpu"), load_data("digits"))["survivors"] == before["survivors"]
    weights = safetensors.torch.load_file(folder(NET) / "model.safetensors")
    assert weights["head.weight"].dtype == torch.float32


def test_weights_that_are_too_large_for_the_repository_are_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    monkeypatch.setattr(shipped, "LIMIT", 1000)
    load_or_train(NET, device="cpu")
    with pytest.raises(StoreError, match=r"its weights take more than 0.001 MB"):
        shipped.pack("smoke", [NET], [NET])


def test_a_weight_that_does_not_fit_into_half_precision_is_refused() -> None:
    load_or_train(NET, device="cpu")
    path = folder(NET) / "model.safetensors"
    weights = safetensors.torch.load_file(path)
    safetensors.torch.save_file(weights | {"head.bias": torch.full_like(weights["head.bias"], 1e5)}, path)
    with pytest.raises(StoreError, match=r"head\.bias does not fit into float16"):
        halve_weights(NET)


def test_the_kits_own_publications_are_whole() -> None:
    for home in paths.published("").glob("*/runs"):
        assert shipped.faults(home.parent.name) == []
        listed = [Path(name) for name in shipped.manifest(home.parent.name)["files"]]
        keys = {path.parent.name for path in listed if path.name == shipped.WEIGHTS}
        card = (home / "README.md").read_text()
        assert keys and {key for key in keys if f"| `{key}` |" not in card} == set()
