"""The notebooks' parameters as strict pydantic models.

papermill injects whatever a YAML file or ``-p`` says: unknown names only draw a warning, and ``1e-3`` and ``8/255``
arrive as strings. So every notebook hands its parameters to ``from_notebook`` in the cell after the ``parameters``
cell, and the batch command reads the same files through ``read``: a bad value ends in one line that names file, key and
what is allowed, before anything trains.
"""

import ast
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Self, TypeVar

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from kdiga_nb import paths
from kdiga_nb.data import DATASETS
from kdiga_nb.losses import NORMS
from kdiga_nb.methods import PRESETS
from kdiga_nb.models import MODELS
from kdiga_nb.numerics.scopes import resolve_device
from kdiga_nb.runs import checkpoints
from kdiga_nb.training import OPTIMIZERS, POLICIES, PRECISIONS, SELECTIONS

P = TypeVar("P", bound=BaseModel)

# What the explorer can show, and the nets it can show it of, under the names that a reader sees.
VIEWS = {"lambda": "λ_IGA: the trade-off", "epsilon": "ε: under attack", "loops": "ISD loops", "image": "one image"}
EXPLORED = {
    "st": "ST, standard training",
    "kd": "KD",
    "kdiga": "KDIGA",
    "ard": "ARD",
    "kdiga_ard_a": "KDIGA-ARD_A",
    "pgd_student": "PGD adversarial training",
    "trades_student": "TRADES",
    "isd_wot": "ISD without teacher (WoT)",
    "isd_wit": "ISD with teacher (WiT)",
}


class ParameterError(ValueError):
    """A parameter file, or a notebook's parameters, that cannot be used; one line for each fault."""


def _number(value: Any) -> Any:
    """8/255 and 1e-3 as numbers; anything else is left for pydantic to judge."""
    if isinstance(value, bool):
        raise ValueError("must be a number")
    if isinstance(value, str):
        try:
            return float(Fraction(value)) if "/" in value else float(value)
        except (ValueError, ZeroDivisionError):
            return value
    return value


def radius_text(epsilon: float) -> str:
    """A radius as readers write it: 0.1, or 8/255 where that is shorter."""
    return min(f"{epsilon:g}", f"{255 * epsilon:g}/{255}", key=len)


def _one_of(names: Mapping[str, Any] | tuple[str, ...]) -> BeforeValidator:
    def check(value: Any) -> Any:
        if not isinstance(value, str) or value not in names:
            raise ValueError(f"must be one of {', '.join(names)}")
        return value

    return BeforeValidator(check)


def _checkpoint(value: Any) -> Any:
    if value != "":
        checkpoints.parse(str(value), "")
    return value


def _device(value: Any) -> Any:
    resolve_device(value)
    return value


Number = Annotated[float, BeforeValidator(_number), Field(allow_inf_nan=False)]
Radius = Annotated[Number, Field(ge=0, le=1)]
Weight = Annotated[Number, Field(ge=0)]
Positive = Annotated[Number, Field(gt=0)]
Count = Annotated[int, Field(ge=1, strict=True)]
Natural = Annotated[int, Field(ge=0, strict=True)]
Probability = Annotated[Number, Field(ge=0, lt=1)]
DatasetName = Annotated[str, _one_of(DATASETS)]
ModelName = Annotated[str, _one_of(MODELS)]
NONE = "none"  # a row that a scale does not run
MaybeDataset = Annotated[str, _one_of((*DATASETS, NONE))]
MaybeModel = Annotated[str, _one_of((*MODELS, NONE))]
# FORMAT:PATH_OR_URL[#sha256=…] of published weights; empty: trained here.
CheckpointText = Annotated[str, BeforeValidator(_checkpoint)]


class Params(BaseModel):
    """What every artefact has: data, nets, training and evaluation. Units: ε and steps in pixels of [0, 1]."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    scale: Annotated[str, Field(pattern=r"^[a-z0-9_]+$")] = "digits"
    dataset: DatasetName = "digits"
    student: ModelName = "digits_small"
    teacher: ModelName = "digits_wide"
    teacher_checkpoint: CheckpointText = ""
    preset: Annotated[str, _one_of(PRESETS)] = "paper"
    seeds: Annotated[list[Natural], Field(min_length=1)] = [0, 1, 2]
    device: Annotated[str, BeforeValidator(_device)] = "auto"

    # evaluation
    epsilon: Radius = 0.1
    pgd_steps: Count = 20
    pgd_restarts: Count = 1
    test_images: Natural = 0
    autoattack_images: Natural = 200
    autoattack_seeds: Natural = 1

    # the loss
    lambda_ce: Weight = 0.5
    lambda_kl: Weight = 0.5
    lambda_iga: Weight = 1.5
    iga_norm: Annotated[str, _one_of(("preset", *NORMS))] = "preset"
    temperature: Positive = 1.0

    # training
    epochs: Count = 15
    batch_size: Count = 64
    learning_rate: Positive = 0.1
    policy: Annotated[str, _one_of(POLICIES)] = "one_cycle"
    milestones: list[Natural] = []
    weight_decay: Weight = 5e-4
    clip_norm: Weight = 1.0
    augment: bool = False
    selection: Annotated[str, _one_of(SELECTIONS)] = "last"
    precision: Annotated[str, _one_of(PRECISIONS)] = "float32"
    train_images: Natural = 0
    teacher_epochs: Count = 15
    teacher_policy: Annotated[str, _one_of(POLICIES)] = "one_cycle"
    train_epsilon: Radius = 0.12
    train_steps: Count = 5
    train_step_size: Radius = 0.0
    at_steps: Count = 5
    beta: Weight = 6.0

    @property
    def radius(self) -> str:
        """ε as readers write it."""
        return radius_text(self.epsilon)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        rising = all(a < b for a, b in zip(self.milestones, self.milestones[1:], strict=False))
        if not rising or any(not 0 < milestone < self.epochs for milestone in self.milestones):
            raise ValueError(f"milestones: must rise and lie between 0 and epochs = {self.epochs}")
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError("seeds: each may stand only once")
        if self.selection == "best_on_test" and self.preset != "author_code":
            raise ValueError("selection: best_on_test is what preset author_code does; choose last or validation")
        return self


class IsdParams(Params):
    """Iterative self-distillation (Algorithms 2 and 3)."""

    loops: Count = 6
    isd_epochs: Count = 12
    lambda_isd: Weight = 30.0
    learning_rate_decay: Positive = 1.0
    head_dropout: Probability = 0.5


class Table1Params(IsdParams):
    """Table 1, Figure 1 and Table 3, which share their runs."""

    wit_loops: Count = 3
    source_tinyimagenet: MaybeDataset = "digits_rotated"
    source_mnist: MaybeDataset = "digits_inverted"
    source_mnist_net: ModelName = "digits_wide"
    source_mnist_checkpoint: CheckpointText = ""
    source_mnist_epsilon: Radius = 0.12
    lambda_adv: Weight = 0.1
    lambda_diff: Weight = 1.0
    head_epochs: Count = 5


class Table3Params(Table1Params):
    """Table 3: the terms of Proposition 2."""

    bound_images: Count = 500
    llm_steps: Count = 20


class Table4Params(IsdParams):
    """Table 4: ISD with and without head dropout."""

    loops: Count = 3
    wit_loops: Count = 2


class ExploreParams(IsdParams):
    """The explorer: what is trained and measured for it beside the tables' runs, and where its controls start."""

    wit_loops: Count = 3
    loops_without_dropout: Count = 3
    wit_loops_without_dropout: Count = 2
    sweep: list[Weight] = [0.5, 8.0, 32.0]
    radii: list[Radius] = [0.025, 0.05, 0.15, 0.2]
    llm_images: Count = 100
    llm_steps: Count = 20
    train_missing: bool = False
    show_view: Annotated[str, _one_of(VIEWS)] = "lambda"
    show_method: Annotated[str, _one_of(EXPLORED)] = "kdiga"
    show_seed: Natural = 0
    show_image: Natural = 0
    show_lambda_iga: Weight = 1.5
    show_epsilon: Radius = 0.1
    show_loop: Count = 1
    show_dropout: bool = True


class Table5Params(Params):
    """Table 5: KDIGA+FGSM."""

    fgsm_student: ModelName = "digits_small"
    fgsm_epochs: Count = 15
    fgsm_policy: Annotated[str, _one_of(POLICIES)] = "one_cycle"
    fgsm_learning_rate: Positive = 0.1
    fgsm_weight_decay: Weight = 5e-4


class Table2Params(Params):
    """Tables 2 and 6: between CNNs and vision transformers."""

    student_medium: ModelName = "digits_medium"
    student_large: ModelName = "digits_large"
    vit: ModelName = "digits_vit"
    vit_checkpoint: CheckpointText = ""
    vit_base: MaybeModel = NONE
    vit_large: MaybeModel = NONE
    deit: MaybeModel = NONE
    vit_epochs: Count = 20
    vit_learning_rate: Positive = 0.006
    vit_optimizer: Annotated[str, _one_of(OPTIMIZERS)] = "adamw"
    vit_weight_decay: Weight = 0.1
    vit_lambda_iga: Weight = 3.0
    finetune_epochs: Count = 15
    finetune_learning_rate: Positive = 0.006
    radii: Annotated[list[Radius], Field(min_length=1)] = [0.05, 0.1]
    pgd_steps: Count = 40


class Table6Params(Table2Params):
    """Table 6: the nets of Table 2 under AutoAttack at several radii."""

    radii: Annotated[list[Radius], Field(min_length=1)] = [0.05, 0.1]


class AuditParams(Table1Params):
    """The audit of five nets of Table 1."""

    audit_loop: Count = 1
    audit_images: Count = 200
    long_steps: Count = 1000
    long_restarts: Count = 10
    long_images: Count = 40
    black_box_images: Count = 100
    queries: Count = 1000


class IsdAutoAttackParams(Table1Params):
    """Iterative self-distillation under AutoAttack, loop by loop."""

    loops_without_dropout: Count = 3
    apgd_images: Count = 100
    long_steps: Count = 1000
    long_images: Count = 40
    gradient_images: Count = 200


class Prop1Params(Params):
    """Proposition 1: certified radii of small ReLU nets."""

    certified_student: ModelName = "digits_mlp"
    certified_teacher: ModelName = "digits_mlp_wide"
    certified_epochs: Count = 20
    certified_epsilon: Radius = 0.05
    certified_images: Count = 200
    lambda_logits: Weight = 0.2


class Prop2Params(Table3Params):
    """Proposition 2, image by image."""


class AblationParams(Params):
    """A fractional factorial of eight choices, and the two presets side by side. Two levels a choice, low then high."""

    ablation_epochs: Count = 8
    ablation_milestones: list[Natural] = [4, 6]
    lambda_levels: Annotated[list[Weight], Field(min_length=2, max_length=2)] = [0.1, 1.0]
    temperature_levels: Annotated[list[Positive], Field(min_length=2, max_length=2)] = [1.0, 4.0]
    dropout_levels: Annotated[list[Probability], Field(min_length=2, max_length=2)] = [0.0, 0.5]

    @model_validator(mode="after")
    def _within(self) -> Self:
        if any(not 0 < milestone < self.ablation_epochs for milestone in self.ablation_milestones):
            raise ValueError(f"ablation_milestones: must lie between 0 and ablation_epochs = {self.ablation_epochs}")
        return self


class ParetoParams(Params):
    """KDIGA+FGSM against fast adversarial training and ARD at its own settings, at the same training cost."""

    fgsm_student: ModelName = "digits_small"
    fgsm_epochs: Count = 15
    fgsm_at_epochs: Count = 30
    ard_epochs: Count = 15
    ard_temperature: Positive = 30.0
    apgd_images: Count = 200


class WalkthroughParams(BaseModel):
    """The walkthrough: nets of a few epochs, a few images."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    scale: Annotated[str, Field(pattern=r"^[a-z0-9_]+$")] = "digits"
    dataset: DatasetName = "digits"
    student: ModelName = "digits_small"
    teacher: ModelName = "digits_wide"
    epsilon: Radius = 0.1
    images: Count = 8
    epochs: Count = 3
    device: Annotated[str, BeforeValidator(_device)] = "auto"


def faults(error: ValidationError, model: type[BaseModel]) -> list[str]:
    """One line for each fault: key, what is wrong, what was given."""
    lines = []
    for fault in error.errors():
        key = ".".join(str(part) for part in fault["loc"])
        if fault["type"] == "extra_forbidden":
            lines.append(f"{key}: unknown key; known are {', '.join(model.model_fields)}")
            continue
        message = fault["msg"].removeprefix("Value error, ")
        message = message[0].lower() + message[1:]
        lines.append(f"{key}: {message}, got {fault['input']!r}" if key else message)
    return lines


def build(model: type[P], values: Mapping[str, Any], source: str) -> P:
    """The parameters, or a ``ParameterError`` whose every line opens with ``source``."""
    try:
        return model(**values)
    except ValidationError as error:
        raise ParameterError("\n".join(f"{source}: {line}" for line in faults(error, model))) from None


def read(model: type[P], path: Path, overrides: Mapping[str, Any] | None = None) -> P:
    """The parameters of a YAML file, with ``overrides`` on top."""
    source = str(path.relative_to(paths.ROOT)) if path.is_relative_to(paths.ROOT) else str(path)
    try:
        values = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise ParameterError(f"{source}: there is no such file") from None
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise ParameterError(f"{source}: not readable as YAML ({str(error).splitlines()[0]})") from None
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ParameterError(f"{source}: must hold a mapping of parameter names to values")
    return build(model, values | dict(overrides or {}), source)


_KERNEL_NAMES = {"In", "Out", "exit", "quit", "get_ipython", "open"}


def from_notebook(model: type[P], namespace: Mapping[str, Any]) -> P:
    """The parameters of a running notebook, from its ``globals()`` right after the parameters cells.

    Every plain value there is a parameter, so a misspelt name that papermill injected is an unknown key here.
    """
    plain = bool | int | float | str | list | tuple | dict
    values = {
        name: value
        for name, value in namespace.items()
        if not name.startswith("_") and name not in _KERNEL_NAMES and (value is None or isinstance(value, plain))
    }
    return build(model, values, "notebook parameters")


def parse_override(text: str) -> tuple[str, Any]:
    """``lambda_iga=3`` as a name and a value, as papermill's ``-p`` reads it."""
    name, separator, value = text.partition("=")
    if not separator or not name:
        raise ParameterError(f"{text!r}: an override is written NAME=VALUE")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value
