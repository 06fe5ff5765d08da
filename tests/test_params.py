"""Parameters: every shipped file, every default, and a table of what is refused, a line a fault, before training."""

import ast
from fractions import Fraction
from pathlib import Path
from typing import Any

import nbformat
import pytest
import yaml
from pydantic import BaseModel

from kdiga_nb.artifacts import EVERY
from kdiga_nb.params import (
    ParameterError,
    Params,
    Table1Params,
    Table2Params,
    Table5Params,
    WalkthroughParams,
    build,
    from_notebook,
    parse_override,
    radius_text,
    read,
)
from kdiga_nb.paths import NOTEBOOKS, PARAMS

FILES = sorted(PARAMS.glob("*/*.yaml"))
SCALES = sorted(path.name for path in PARAMS.iterdir())
MODELS: dict[str, type[BaseModel]] = {name: artifact.params for name, artifact in EVERY.items()}
MODELS |= {"walkthrough": WalkthroughParams}


def keys(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())


def notebook_defaults(name: str) -> dict[str, Any]:
    """What the ``parameters`` cell of a notebook assigns."""
    cells = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4).cells
    (cell,) = [cell for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    found = {}
    for node in ast.parse(cell.source).body:
        assert isinstance(node, ast.AnnAssign)
        assert isinstance(node.target, ast.Name)
        assert node.value is not None
        found[node.target.id] = ast.literal_eval(node.value)
    return found


# ---- the shipped files ----


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_shipped_file(path: Path):
    values = keys(path)
    params = read(MODELS[path.stem], path)
    assert set(values) <= set(notebook_defaults(path.stem))
    assert params.model_dump()["scale"] == path.parent.name
    # A key that a file leaves out would change its meaning when the default does.
    assert set(values) == set(type(params).model_fields)


def test_no_shipped_file_goes_untested():
    assert {"digits", "smoke"} <= set(SCALES)
    assert len(FILES) == len(SCALES) * len(MODELS)
    assert {path.stem for path in FILES} == set(MODELS)


@pytest.mark.parametrize("name", MODELS)
def test_digits_is_the_default_everywhere(name: str):
    defaults = MODELS[name]().model_dump()
    assert notebook_defaults(name) == defaults
    assert keys(PARAMS / "digits" / f"{name}.yaml") == defaults


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize(
    ("names", "own"),
    [
        (("table1", "table3", "figure1", "robustness_audit", "isd_autoattack", "prop2_bound"), set()),
        (("table2", "table6"), {"radii"}),
    ],
    ids=["Table 1 and what stands on its runs", "Tables 2 and 6"],
)
def test_artefacts_that_share_runs_share_their_parameters(scale: str, names: tuple[str, ...], own: set[str]):
    first, *others = (keys(PARAMS / scale / f"{name}.yaml") for name in names)
    for other in others:
        common = set(first) & set(other) - own
        assert {key: other[key] for key in common} == {key: first[key] for key in common}


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", EVERY)
def test_what_every_artefact_has_is_the_same_in_all_of_a_scale(scale: str, name: str):
    shared = {"scale", "dataset", "student", "teacher", "preset", "seeds", "epsilon", "lambda_iga", "train_epsilon"}
    first, here = (keys(PARAMS / scale / f"{stem}.yaml") for stem in ("table1", name))
    assert {key: here[key] for key in shared} == {key: first[key] for key in shared}


# ---- numbers as YAML and papermill hand them over ----


@pytest.mark.parametrize(
    ("text", "number"),
    [("8/255", 8 / 255), ("1e-3", 1e-3), ("0.5", 0.5), ("1", 1.0), ("1/4", 0.25), (" 8/255", 8 / 255)],
)
def test_numbers_written_as_strings(text: str, number: float, tmp_path: Path):
    path = tmp_path / "table5.yaml"
    path.write_text(f"epsilon: {text}\nweight_decay: {text}\n")
    params = read(Table5Params, path)
    assert (params.epsilon, params.weight_decay) == (number, number)
    assert type(params.epsilon) is float


def test_numbers_written_as_strings_inside_a_list():
    assert build(Table2Params, {"radii": ["1/255", "1e-2", 0.5]}, "here").radii == [1 / 255, 0.01, 0.5]


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("lambda_iga=3", ("lambda_iga", 3)),
        ("epsilon=8/255", ("epsilon", "8/255")),
        ("seeds=[0, 1]", ("seeds", [0, 1])),
        ("augment=True", ("augment", True)),
        ("preset=author_code", ("preset", "author_code")),
        ("device=cuda:0", ("device", "cuda:0")),
        ("student=a=b", ("student", "a=b")),
        ("student=", ("student", "")),
    ],
)
def test_override(text: str, parsed: tuple[str, Any]):
    assert parse_override(text) == parsed


@pytest.mark.parametrize("text", ["lambda_iga", "=3", ""])
def test_an_override_that_is_none(text: str):
    with pytest.raises(ParameterError, match="NAME=VALUE"):
        parse_override(text)


def test_overrides_stand_above_the_file():
    path = PARAMS / "smoke" / "table5.yaml"
    assert read(Table5Params, path, {"lambda_iga": "7"}).lambda_iga == 7.0
    assert read(Table5Params, path).lambda_iga == keys(path)["lambda_iga"]


# ---- what is refused ----

REFUSED: list[tuple[str, Any, str]] = [
    ("no_such_key", 1, "unknown key; known are .*lambda_iga"),
    ("lamda_iga", 1, "unknown key; known are .*lambda_iga"),
    ("epsilon", -0.1, "greater than or equal to 0"),
    ("epsilon", 1.5, "less than or equal to 1"),
    ("epsilon", "8/0", "valid number"),
    ("epsilon", "wide", "valid number"),
    ("epsilon", None, "valid number"),
    ("epsilon", [0.1], "valid number"),
    ("epsilon", True, "number"),
    ("epsilon", float("nan"), "number|greater|less"),
    ("lambda_iga", -1, "greater than or equal to 0"),
    ("lambda_iga", float("inf"), "finite number"),
    ("learning_rate", float("inf"), "finite number"),
    ("learning_rate", 0, "greater than 0"),
    ("temperature", 0, "greater than 0"),
    ("loops", 0, "greater than or equal to 1"),
    ("loops", 2.5, "valid integer"),
    ("epochs", "20", "valid integer"),
    ("epochs", True, "valid integer"),
    ("head_dropout", 1.0, "less than 1"),
    ("student", "resnet_18", "must be one of digits_small.*, got 'resnet_18'"),
    ("student", 18, "must be one of digits_small"),
    ("student", ["digits_small"], "must be one of digits_small"),
    ("dataset", "mnits", "must be one of digits.*, got 'mnits'"),
    ("dataset", {"name": "digits"}, "must be one of digits"),
    ("preset", "authors", "must be one of paper, author_code, got 'authors'"),
    ("iga_norm", "l2", "must be one of preset, per_sample, batch"),
    ("policy", "cosine", "must be one of multistep, one_cycle, constant"),
    ("selection", "best", "must be one of last, validation"),
    ("scale", "Up/../there", "pattern"),
    ("milestones", [10, 5], "must rise and lie between 0 and epochs = 15"),
    ("milestones", [0, 5], "must rise and lie between 0 and epochs = 15"),
    ("milestones", [5, 20], "must rise and lie between 0 and epochs = 15"),
    ("milestones", 5, "valid list"),
    ("seeds", [0, 1, 0], "may stand only once"),
    ("seeds", [], "at least 1 item"),
    ("seeds", [-1], "greater than or equal to 0"),
    ("seeds", 3, "valid list"),
    ("device", "cuda:99", "device 'cuda:99' is not there"),
    ("device", "nonsense", "device 'nonsense' is not there"),
    ("device", 3.5, "device"),
    ("device", ["cpu"], "device"),
]


@pytest.mark.parametrize(("key", "value", "says"), REFUSED, ids=[f"{key}={value}" for key, value, _ in REFUSED])
def test_refused_with_file_key_and_what_is_allowed(key: str, value: Any, says: str, tmp_path: Path):
    path = tmp_path / "table1.yaml"
    path.write_text(yaml.safe_dump({key: value}))
    with pytest.raises(ParameterError, match=says) as error:
        read(Table1Params, path)
    (line,) = str(error.value).splitlines()
    assert line.startswith(f"{path}: ")
    assert key in line


def test_one_line_for_each_fault():
    with pytest.raises(ParameterError) as error:
        build(Table1Params, {"epsilon": 2, "loops": 0, "nonsense": 1}, "here")
    lines = str(error.value).splitlines()
    assert len(lines) == 3
    assert all(line.startswith("here: ") for line in lines)


@pytest.mark.parametrize("model", [Params, *MODELS.values()], ids=lambda model: model.__name__)
def test_an_unknown_key_is_answered_with_the_known_ones(model: type[BaseModel]):
    with pytest.raises(ParameterError) as error:
        build(model, {"nonsense": 1}, "here")
    known = str(error.value).partition("known are ")[2]
    assert known.split(", ") == list(model.model_fields)


def test_selection_on_the_test_set_needs_the_authors_preset():
    with pytest.raises(ParameterError, match="selection"):
        build(Table1Params, {"selection": "best_on_test", "preset": "paper"}, "here")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("- epsilon\n- 0.1\n", "must hold a mapping"),
        ("", "must hold a mapping"),
        ("just text", "must hold a mapping"),
        ("1: 2\n", "must hold a mapping"),
        ("epsilon: [0.1\n", "not readable as YAML"),
        ("epsilon: !!python/object/apply:os.getcwd []\n", "not readable as YAML"),
        ("\tepsilon: 1", "not readable as YAML"),
    ],
)
def test_files_that_are_no_parameter_files(content: str, says: str, tmp_path: Path):
    path = tmp_path / "table1.yaml"
    path.write_text(content)
    with pytest.raises(ParameterError, match=says) as error:
        read(Table1Params, path)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)


def test_files_that_are_not_there_or_not_text(tmp_path: Path):
    with pytest.raises(ParameterError, match="there is no such file"):
        read(Table1Params, tmp_path / "table1.yaml")
    with pytest.raises(ParameterError, match="not readable"):
        read(Table1Params, tmp_path)
    (tmp_path / "table2.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ParameterError, match="not readable"):
        read(Table1Params, tmp_path / "table2.yaml")


def test_a_file_of_the_kit_is_named_without_its_folder():
    with pytest.raises(ParameterError, match=r"^params/smoke/table5\.yaml: epsilon: "):
        read(Table5Params, PARAMS / "smoke" / "table5.yaml", {"epsilon": 3})


# ---- in a running notebook ----


def namespace(**changes: Any) -> dict[str, Any]:
    """What ``globals()`` holds in a kernel after the parameters cells."""
    kernel = {"In": ["", "x"], "Out": {}, "exit": object(), "quit": object(), "get_ipython": print, "open": open}
    hidden = {"__name__": "__main__", "_ih": [""], "_oh": {}, "_dh": ["/"], "_i": "", "_": "", "__doc__": "text"}
    modules = {"nbformat": nbformat, "Table5Params": Table5Params, "from_notebook": from_notebook}
    return kernel | hidden | modules | notebook_defaults("table5") | changes


def test_a_notebooks_own_names_are_no_parameters():
    assert from_notebook(Table5Params, namespace()) == Table5Params()
    assert from_notebook(Table5Params, namespace(lambda_iga="1e1")).lambda_iga == 10.0


@pytest.mark.parametrize("value", [3, 3.0, "3", None, [3], {"a": 3}, True])
def test_a_misspelt_name_that_was_injected_is_caught(value: Any):
    with pytest.raises(ParameterError, match=r"^notebook parameters: lamda_iga: unknown key"):
        from_notebook(Table5Params, namespace(lamda_iga=value))


def test_a_bad_value_that_was_injected_is_caught():
    with pytest.raises(ParameterError, match=r"^notebook parameters: epsilon: .*got 5"):
        from_notebook(Table5Params, namespace(epsilon=5))


def test_parameters_do_not_change_after_they_were_checked():
    with pytest.raises(ValueError, match="frozen"):
        Table5Params().epsilon = 0.5  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("epsilon", "text"), [(8 / 255, "8/255"), (1 / 255, "1/255"), (0.1, "0.1"), (0.2, "0.2"), (0.0, "0"), (1.0, "1")]
)
def test_a_radius_is_written_as_readers_write_it(epsilon: float, text: str) -> None:
    assert radius_text(epsilon) == text
    assert float(Fraction(text)) == epsilon
