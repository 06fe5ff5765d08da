"""Parameters: every shipped file and section, and a table of what is refused, one line per fault, before training."""

import ast
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import nbformat
import pytest
import yaml
from pydantic import BaseModel

from kdiga_nb import params, paths
from kdiga_nb.artifacts import EVERY
from kdiga_nb.params import (
    ParameterError,
    Params,
    Table1Params,
    Table2Params,
    Table5Params,
    WalkthroughParams,
    at_scale,
    from_notebook,
    parse_override,
    radius_text,
    read,
    scales,
)
from kdiga_nb.paths import NOTEBOOKS, PARAMS

SCALES = scales()
MODELS: dict[str, type[BaseModel]] = {name: artifact.params for name, artifact in EVERY.items()}
MODELS |= {"walkthrough": WalkthroughParams}
MOST_IN_A_CELL = 8


def settings(scale: str) -> dict[str, Any]:
    return yaml.safe_load((PARAMS / f"{scale}.yaml").read_text())["settings"]


def cell_of(name: str) -> str:
    """The source of a notebook's ``parameters`` cell."""
    cells = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4).cells
    (cell,) = [cell for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    return cell.source


def notebook_defaults(name: str) -> dict[str, Any]:
    """What the ``parameters`` cell of a notebook assigns."""
    assigned = {}
    for node in ast.parse(cell_of(name)).body:
        assert isinstance(node, ast.AnnAssign)
        assert isinstance(node.target, ast.Name)
        assert node.value is not None
        assigned[node.target.id] = ast.literal_eval(node.value)
    return assigned


# ---- the shipped files ----


def test_there_is_one_file_per_scale():
    assert set(SCALES) == {"smoke", "digits", "cifar10", "cifar10_cpu", "cifar10_short", "imagenette", "imagenet"}
    assert {path.name for path in PARAMS.iterdir()} == {f"{scale}.yaml" for scale in SCALES}


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", MODELS)
def test_a_scale_gives_every_artefact_its_settings(scale: str, name: str):
    assert at_scale(MODELS[name], scale) == read(MODELS[name], PARAMS / f"{scale}.yaml")
    assert at_scale(MODELS[name], scale).model_dump()["scale"] == scale


@pytest.mark.parametrize("scale", SCALES)
def test_every_setting_of_a_file_serves_an_artefact(scale: str):
    fields = {field for model in MODELS.values() for field in model.model_fields}
    common = {key: value for key, value in settings(scale).items() if key not in params.models()}
    assert set(common) <= fields
    assert {len(line) <= 120 for line in (PARAMS / f"{scale}.yaml").read_text().splitlines()} == {True}


@pytest.mark.parametrize("scale", SCALES)
def test_a_file_says_nothing_twice(scale: str):
    values = settings(scale)
    for section, own in values.items():
        if section in params.models():
            assert own and not [key for key, value in own.items() if key in values and values[key] == value]
        else:
            defaults = [model.model_fields[section] for model in MODELS.values() if section in model.model_fields]
            assert not any(not field.is_required() and field.default == own for field in defaults), section


def about_seeds(scale: str) -> set[str]:
    """What differs to save time. CIFAR-10: Table 1 (and what is beside it) has several seeds; digits: see its file."""
    several = {"seeds", "shared_teacher", "all_seeds_rows", "autoattack_seeds"}
    return {"cifar10_cpu": several, "cifar10_short": several, "digits": {"seeds"}}.get(scale, set())


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize(
    ("names", "own"),
    [
        (("table1", "table3", "figure1", "robustness_audit", "isd_autoattack", "prop2_bound"), set()),
        (("table2", "table6"), {"radii", "pgd_steps"}),
    ],
    ids=["Table 1 and what uses its runs", "Tables 2 and 6"],
)
def test_artefacts_that_share_runs_share_their_parameters(scale: str, names: tuple[str, ...], own: set[str]):
    first, *others = (at_scale(MODELS[name], scale).model_dump() for name in names)
    for other in others:
        common = set(first) & set(other) - own - about_seeds(scale)
        assert {key: other[key] for key in common} == {key: first[key] for key in common}


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", EVERY)
def test_what_every_artefact_has_is_the_same_in_all_of_a_scale(scale: str, name: str):
    shared = {"scale", "dataset", "student", "teacher", "preset", "seeds", "epsilon", "lambda_iga", "train_epsilon"}
    shared -= about_seeds(scale)
    first, here = (at_scale(MODELS[stem], scale).model_dump() for stem in ("table1", name))
    assert {key: here[key] for key in shared} == {key: first[key] for key in shared}


@pytest.mark.parametrize("model", [Params, *MODELS.values()], ids=lambda model: model.__name__)
def test_every_setting_says_what_it_means(model: type[BaseModel]):
    assert [name for name, field in model.model_fields.items() if not field.description] == []


# ---- the notebooks' parameters cells ----


@pytest.mark.parametrize("name", MODELS)
def test_a_parameters_cell_holds_the_scale_and_a_handful(name: str):
    defaults = notebook_defaults(name)
    assert list(defaults)[:2] == ["scale", "settings"]
    assert defaults.pop("scale") == "digits" and defaults.pop("settings") == {}
    assert set(defaults) <= set(MODELS[name].model_fields) and 0 < len(defaults) <= MOST_IN_A_CELL - 2
    assert set(defaults.values()) == {None}


@pytest.mark.parametrize("name", ["table1", "explore", "walkthrough"])
def test_papermill_lists_every_parameter_of_a_notebook(name: str):
    command = [sys.executable, "-m", "papermill", "--help-notebook", str(NOTEBOOKS / f"{name}.ipynb")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    listed = [line.split(":")[0].strip() for line in done.stdout.splitlines() if "(default" in line]
    assert listed == list(notebook_defaults(name))


@pytest.mark.parametrize("name", MODELS)
def test_papermill_can_read_every_comment(name: str):
    # A second # would make papermill drop the line.
    assert {line.count("#") for line in cell_of(name).splitlines()} == {1}


# ---- numbers as YAML and papermill pass them ----


@pytest.mark.parametrize(
    ("text", "number"),
    [("8/255", 8 / 255), ("1e-3", 1e-3), ("0.5", 0.5), ("1", 1.0), ("1/4", 0.25), (" 8/255", 8 / 255)],
)
def test_numbers_written_as_strings(text: str, number: float, tmp_path: Path):
    path = tmp_path / "mine.yaml"
    path.write_text(f"epsilon: {text}\nsettings:\n  weight_decay: {text}\n")
    mine = read(Table5Params, path)
    assert (mine.epsilon, mine.weight_decay) == (number, number)
    assert type(mine.epsilon) is float


def test_numbers_written_as_strings_inside_a_list():
    assert at_scale(Table2Params, "digits", {"radii": ["1/255", "1e-2", 0.5]}).radii == [1 / 255, 0.01, 0.5]


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


def test_each_layer_is_above_the_one_before(tmp_path: Path):
    assert at_scale(Table2Params, "digits").pgd_steps == 40  # a section
    assert at_scale(Table1Params, "digits").pgd_steps == settings("digits")["pgd_steps"] == 20  # a common setting
    path = tmp_path / "mine.yaml"
    path.write_text("scale: digits\nsettings: {pgd_steps: 7, epochs: 3, table2: {epochs: 4}}\n")
    assert [read(model, path).pgd_steps for model in (Table1Params, Table2Params)] == [7, 7]
    assert [read(model, path).epochs for model in (Table1Params, Table2Params)] == [3, 4]
    path.write_text(path.read_text() + "epochs: 5\nartefact: table2\n")
    assert read(Table2Params, path).epochs == 5
    assert read(Table2Params, path, {"epochs": 6}).epochs == 6


def test_a_file_without_a_scale_is_about_digits(tmp_path: Path):
    path = tmp_path / "mine.yaml"
    path.write_text("lambda_iga: 9\n")
    assert read(Table1Params, path) == at_scale(Table1Params, "digits", {"lambda_iga": 9})


# ---- what is refused ----

REFUSED: list[tuple[str, Any, str]] = [
    ("no_such_key", 1, "unknown key; known are .*lambda_iga"),
    ("lamda_iga", 1, r"unknown key \(did you mean lambda_iga\?\); known are .*lambda_iga"),
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
    ("student", "resnet_18", r"must be one of digits_small.* \(did you mean resnet18\?\), got 'resnet_18'"),
    ("student", 18, "must be one of digits_small"),
    ("student", ["digits_small"], "must be one of digits_small"),
    ("dataset", "mnits", r"must be one of digits.* \(did you mean mnist\?\), got 'mnits'"),
    ("dataset", {"name": "digits"}, "must be one of digits"),
    ("preset", "authors", "must be one of paper, author_code .*got 'authors'"),
    ("iga_norm", "l2", "must be one of preset, per_sample, batch"),
    ("policy", "cosine", "must be one of multistep, one_cycle, constant"),
    ("selection", "best", "must be one of last, validation"),
    ("scale", "Up/../there", "must be one of .*digits"),
    ("scale", "cifar", r"must be one of .*\(did you mean cifar10\?\), got 'cifar'"),
    ("milestones", [10, 5], "must rise and lie between 0 and epochs = 15"),
    ("milestones", [0, 5], "must rise and lie between 0 and epochs = 15"),
    ("milestones", [5, 20], "must rise and lie between 0 and epochs = 15"),
    ("milestones", 5, "valid list"),
    ("seeds", [0, 1, 0], "may appear only once"),
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
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({key: value}))
    with pytest.raises(ParameterError, match=says) as error:
        read(Table1Params, path)
    (line,) = str(error.value).splitlines()
    assert line.startswith(f"{path}: ")
    assert key in line


def test_one_line_for_each_fault():
    with pytest.raises(ParameterError) as error:
        at_scale(Table1Params, "digits", {"epsilon": 2, "loops": 0, "nonsense": 1})
    lines = str(error.value).splitlines()
    assert len(lines) == 3
    assert all(line.startswith("params/digits.yaml: ") for line in lines)


@pytest.mark.parametrize("model", [Params, *MODELS.values()], ids=lambda model: model.__name__)
def test_an_unknown_key_is_answered_with_the_known_ones(model: type[BaseModel]):
    with pytest.raises(ParameterError) as error:
        at_scale(model, "digits", {"nonsense": 1})
    known = str(error.value).partition("known are ")[2]
    assert known.split(", ") == list(model.model_fields)


def test_selection_on_the_test_set_needs_the_authors_preset():
    with pytest.raises(ParameterError, match="selection"):
        at_scale(Table1Params, "digits", {"selection": "best_on_test", "preset": "paper"})


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
    path = tmp_path / "mine.yaml"
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
    with pytest.raises(ParameterError, match=r"^params/smoke\.yaml: epsilon: "):
        read(Table5Params, PARAMS / "smoke.yaml", {"epsilon": 3})


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"lamda_iga": 1}, r"^{}: lamda_iga: unknown key \(did you mean lambda_iga\?\); known are "),
        ({"tabel5": {"epochs": 1}}, r"^{}: tabel5: unknown key \(did you mean table5\?\); known are "),
        ({"table5": {"loops": 1}}, r"^{}: table5: loops: unknown key; known are scale, "),
        ({"table2": {"loops": 1}}, r"^{}: table2: loops: unknown key; known are scale, "),
        ({"table5": 3}, r"^{}: table5: must hold a mapping"),
        ([1], r"^{}: settings: must hold a mapping"),
        ({"epochs": 0}, r"^{}: epochs: .*greater than or equal to 1"),
    ],
)
def test_settings_refused_with_file_section_and_key(content: Any, says: str, tmp_path: Path):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"settings": content}))
    with pytest.raises(ParameterError, match=says.format(path)):
        read(Table5Params, path)


def test_a_shipped_file_holds_scale_and_settings_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(paths, "PARAMS", tmp_path)
    files = {"one": "scale: two\nsettings: {}\n", "two": "scale: two\nsettings: {}\nepochs: 3\n"}
    for name, content in files.items():
        (tmp_path / f"{name}.yaml").write_text(content)
        with pytest.raises(
            ParameterError, match=f"^params/{name}.yaml: must hold scale: {name}, settings: and nothing"
        ):
            at_scale(Table5Params, name)


# ---- in a running notebook ----


CALL = "params = from_notebook(Table5Params, globals())"


def namespace(**injected: Any) -> dict[str, Any]:
    """What ``globals()`` holds in a kernel at the call of ``from_notebook``, papermill's cell with ``injected`` run."""
    cells = ["", "import nbformat", cell_of("table5")]
    cells += ["# Parameters\n" + "\n".join(f"{k} = {v!r}" for k, v in injected.items())] if injected else []
    kernel = {"In": [*cells, CALL], "Out": {}, "exit": object(), "quit": object(), "get_ipython": print, "open": open}
    hidden = {"__name__": "__main__", "_ih": [""], "_oh": {}, "_dh": ["/"], "_i": "", "_": "", "__doc__": "text"}
    modules = {"nbformat": nbformat, "Table5Params": Table5Params, "from_notebook": from_notebook}
    return kernel | hidden | modules | notebook_defaults("table5") | injected


DIGITS = at_scale(Table5Params, "digits")


def test_a_notebook_at_its_defaults_is_the_digits_scale():
    assert from_notebook(Table5Params, namespace()) == DIGITS
    assert from_notebook(Table5Params, namespace(lambda_iga="1e1")).lambda_iga == 10.0


def test_another_scale_is_its_file():
    assert from_notebook(Table5Params, namespace(scale="cifar10")) == at_scale(Table5Params, "cifar10")
    values = yaml.safe_load((PARAMS / "cifar10.yaml").read_text())
    assert from_notebook(Table5Params, namespace(**values)) == at_scale(Table5Params, "cifar10")
    assert from_notebook(Table5Params, namespace(**values, lambda_iga=3)).lambda_iga == 3


def test_a_setting_outside_the_cell_can_be_injected_too():
    assert from_notebook(Table5Params, namespace(weight_decay="1/2000")).weight_decay == 1 / 2000


def test_run_all_again_in_the_same_kernel():
    """The names of the first pass are no parameters in the second, and an edited cell counts."""
    after = namespace(lambda_iga=2.0) | {"robust": "pgd20", "figures": {}, "table": [1], "epochs": 99}
    edited = cell_of("table5").replace("epsilon: float = None", "epsilon: float = 0.2")
    assert "0.2" in edited
    second = [*after["In"], "robust = 'pgd20'", "table = report.frame(experiment)", edited, CALL]
    found = from_notebook(Table5Params, after | {"In": second, "epsilon": 0.2})
    assert found == at_scale(Table5Params, "digits", {"epsilon": 0.2, "lambda_iga": 2.0})
    injected = "# Parameters\nlambda_iga = 2.0"
    third = from_notebook(Table5Params, after | {"In": [*second[:-1], injected, CALL], "epsilon": None})
    assert third == at_scale(Table5Params, "digits", {"lambda_iga": 2.0})


def test_in_a_script_every_plain_value_so_far_is_a_parameter():
    script = {name: value for name, value in namespace(epsilon=0.3).items() if name != "In"}
    assert from_notebook(Table5Params, script).epsilon == 0.3
    assert from_notebook(Table5Params, script | {"WEIGHTED": {"kd": 1}, "_private": 2}).epsilon == 0.3


@pytest.mark.parametrize("value", [3, 3.0, "3", None, [3], {"a": 3}, True])
def test_a_misspelt_name_that_was_injected_is_caught(value: Any):
    with pytest.raises(ParameterError, match=r"^notebook parameters: lamda_iga: unknown key \(did you mean"):
        from_notebook(Table5Params, namespace(lamda_iga=value))


def test_a_bad_value_that_was_injected_is_caught():
    with pytest.raises(ParameterError, match=r"^notebook parameters: epsilon: .*got 5"):
        from_notebook(Table5Params, namespace(epsilon=5))


def test_parameters_do_not_change_after_they_were_checked():
    with pytest.raises(ValueError, match="frozen"):
        DIGITS.epsilon = 0.5  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("epsilon", "text"), [(8 / 255, "8/255"), (1 / 255, "1/255"), (0.1, "0.1"), (0.2, "0.2"), (0.0, "0"), (1.0, "1")]
)
def test_a_radius_is_written_as_readers_write_it(epsilon: float, text: str) -> None:
    assert radius_text(epsilon) == text
    assert float(Fraction(text)) == epsilon
