"""The settings of every artefact as strict pydantic models, and where their values come from.

A setting's meaning, source and allowed values stand once, as a field of a model here. A scale's values stand once, in
``params/<scale>.yaml``. The layers, each above the one before:

1. the default of the field, for settings that are the same at every scale;
2. the scale's file: common settings, then the section of the artefact;
3. ``settings`` of a notebook or of a file of one's own, in the same form;
4. single names: those that a notebook's ``parameters`` cell or ``papermill -p`` assigns, those at the top of a file of
   one's own, and ``--set``.

papermill only warns about unknown names and passes ``1e-3`` and ``8/255`` as strings. Every notebook therefore calls
``from_notebook`` in the cell after its ``parameters`` cell, and the command calls ``read``. A bad value raises an error
of one line, with source, key and allowed values, before anything trains.
"""

import ast
import difflib
from collections.abc import Iterable, Mapping
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from kdiga_nb import paths
from kdiga_nb.data import DATASETS
from kdiga_nb.losses import NORMS
from kdiga_nb.methods import PRESETS
from kdiga_nb.models import MODELS
from kdiga_nb.numerics.scopes import resolve_device
from kdiga_nb.runs import checkpoints
from kdiga_nb.training import BATCH_NORM, OPTIMIZERS, POLICIES, PRECISIONS, SELECTIONS

P = TypeVar("P", bound=BaseModel)

# The explorer's views and methods, with the names that a reader sees.
VIEWS = {
    "glance": "at a glance",
    "lambda": "λ_IGA: the trade-off",
    "epsilon": "ε: under attack",
    "film": "attack film",
    "loops": "ISD loops",
    "image": "one image",
}
EXPLORED = {
    "st": "ST",
    "kd": "KD",
    "kdiga": "KDIGA",
    "penalty": "gradient penalty",
    "ard": "ARD",
    "kdiga_ard_a": "KDIGA-ARD_A",
    "pgd_student": "PGD adversarial training",
    "trades_student": "TRADES",
    "isd_wot": "ISD-WoT",
    "isd_wit": "ISD-WiT",
}


class ParameterError(ValueError):
    """Parameters that cannot be used; one line per fault."""


def _number(value: Any) -> Any:
    """8/255 and 1e-3 as numbers; pydantic checks any other value."""
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


def _one_of(names: Iterable[str]) -> BeforeValidator:
    allowed = tuple(names)

    def check(value: Any) -> Any:
        if not isinstance(value, str) or value not in allowed:
            raise ValueError(f"must be one of {', '.join(allowed)}{did_you_mean(value, allowed)}")
        return value

    return BeforeValidator(check, json_schema_input_type=Literal[allowed])  # pyright: ignore[reportArgumentType, reportInvalidTypeForm]


def did_you_mean(value: Any, names: Iterable[str]) -> str:
    """`` (did you mean …?)`` if one of the names is close to the value, else nothing."""
    close = difflib.get_close_matches(str(value), list(names), 1)
    return f" (did you mean {close[0]}?)" if close else ""


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
Scale = Annotated[str, Field(pattern=r"^[a-z0-9_]+$")]
Device = Annotated[str, BeforeValidator(_device)]
Seeds = Annotated[list[Natural], Field(min_length=1)]
Radii = Annotated[list[Radius], Field(min_length=1)]
DatasetName = Annotated[str, _one_of(DATASETS)]
ModelName = Annotated[str, _one_of(MODELS)]
NONE = "none"  # a row that a scale does not run
MaybeDataset = Annotated[str, _one_of((*DATASETS, NONE))]
MaybeModel = Annotated[str, _one_of((*MODELS, NONE))]
# FORMAT:PATH_OR_URL[#sha256=…] of published weights; empty: trained here.
CheckpointText = Annotated[str, BeforeValidator(_checkpoint)]


def _knob(description: str, **more: Any) -> Any:
    """A field with its meaning; a field without ``default`` has a value in every scale's file."""
    return Field(description=description, **more)


class Params(BaseModel):
    """Settings of every artefact: data, nets, training and evaluation. Radii and steps are in pixels of [0, 1]."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    section: ClassVar[str] = ""  # the section of a scale's file with this artefact's own settings

    scale: Scale = _knob("the file params/<scale>.yaml, and the folder of figures/ that results go to")
    dataset: DatasetName = _knob("images in [0, 1]")
    student: ModelName = _knob("net of the student (App. D: MobileNetV2)")
    teacher: ModelName = _knob("net of the robust teacher (App. D: a WideResNet; TRADES publishes WRN-34-10)")
    teacher_checkpoint: CheckpointText = _knob(
        "published weights of the teacher, FORMAT:PATH_OR_URL[#sha256=…]; empty: trained here", default=""
    )
    preset: Annotated[str, _one_of(PRESETS)] = _knob(
        "what the paper leaves open (norm, reduction of KL, ARD's target, second learning rate step, selection): as "
        "the paper says, or as its authors' code does",
        default="paper",
    )
    seeds: Seeds = _knob("one training per seed; mean and interval are over them (the paper trains once)")
    shared_teacher: bool = _knob("one robust teacher, of the first seed, for the students of all seeds", default=False)
    device: Device = _knob("auto, cpu or cuda", default="auto")

    epsilon: Radius = _knob("radius of the ℓ∞ ball (Table 1: 8/255)")
    pgd_steps: Count = _knob("steps of the evaluation attack, each 2·epsilon/pgd_steps long (App. D: 20)")
    pgd_restarts: Count = _knob("random restarts of the evaluation attack", default=1)
    test_images: Natural = _knob("how many test images are measured; 0: all")
    autoattack_images: Natural = _knob("AutoAttack: how many test images; 0: not run (App. D: all)")
    autoattack_seeds: Natural = _knob("AutoAttack: on how many of the seeds", default=1)
    autoattack_rows: list[str] = _knob("rows of Table 1 and its studies with AutoAttack on every seed", default=[])

    lambda_ce: Weight = _knob("weight of the cross-entropy (App. E)", default=0.5)
    lambda_kl: Weight = _knob("weight of the distillation term (App. E)", default=0.5)
    lambda_iga: Weight = _knob("weight of the input gradient alignment (App. E: 1/B, read as 1 times the batch's mean)")
    iga_norm: Annotated[str, _one_of(("preset", *NORMS))] = _knob(
        "per_sample (the paper's equation), batch (the authors' code), or that of the preset", default="preset"
    )
    temperature: Positive = _knob("of the distillation; the paper does not say, the authors' code has 1", default=1.0)

    epochs: Count = _knob("of a student (App. E: 150)")
    batch_size: Count = _knob("images per step (the authors' code: 128)")
    learning_rate: Positive = _knob("of SGD; the peak for one_cycle (App. E: 0.1)", default=0.1)
    policy: Annotated[str, _one_of(POLICIES)] = _knob("how the learning rate moves (App. E: multistep)")
    milestones: list[Natural] = _knob("epochs at which multistep divides the rate by ten (App. E: 50 and 100)")
    weight_decay: Weight = _knob("of SGD (App. E: 2e-4)")
    clip_norm: Weight = _knob("bound on the gradient's ℓ2 norm; 0: none, as in the authors' code")
    augment: bool = _knob("the data set's augmentation (the authors' code: crop out of 4 pixels' padding, and flip)")
    selection: Annotated[str, _one_of(SELECTIONS)] = _knob(
        "epoch that is kept: the last, or the best on held-out training images by PGD-20 (ST and KD, which have no "
        "robustness: by clean accuracy); best_on_test is the paper's way and needs preset author_code"
    )
    precision: Annotated[str, _one_of(PRECISIONS)] = _knob(
        "of convolutions and matrix products; losses and the alignment stay in float32", default="float32"
    )
    batch_norm: Annotated[str, _one_of(BATCH_NORM)] = _knob(
        "with several processes: statistics of the whole batch, or per_process, which saves communication",
        default="synchronised",
    )
    train_images: Natural = _knob("train on the first so many images; 0: all", default=0)
    teacher_epochs: Count = _knob("of an adversarially trained teacher (TRADES' authors publish epoch 76)")
    train_epsilon: Radius = _knob("radius of the training attacks (the paper does not say)")
    train_steps: Count = _knob("steps of the training attacks (TRADES, ARD: 10)")
    train_step_size: Radius = _knob("step of the training attacks; 0: train_epsilon/3 (ARD: 2/255, TRADES: 0.007)")
    at_steps: Count = _knob("steps of the attack of plain adversarial training (PGD-7 in the paper)")
    beta: Weight = _knob("TRADES: weight of the consistency term (its authors' 6)", default=6.0)

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
            raise ValueError("seeds: each may appear only once")
        if self.selection == "best_on_test" and self.preset != "author_code":
            raise ValueError("selection: best_on_test needs preset author_code; choose last or validation")
        return self


class IsdParams(Params):
    """Iterative self-distillation (Algorithms 2 and 3)."""

    loops: Count = _knob("ISD-WoT loops")
    wit_loops: Count = _knob("ISD-WiT loops (Table 1 does not say how many)")
    isd_epochs: Count = _knob("epochs of a loop (the authors' code: 150)")
    lambda_isd: Weight = _knob("weight of the alignment in self-distillation (App. E makes no difference)")
    learning_rate_decay: Positive = _knob(
        "μ of Algorithm 2: a loop starts at μ·learning_rate (App. E: 0.01; the authors' code: loop 1 at the full rate)"
    )
    head_dropout: Probability = _knob("before the last layer, while a loop trains (the authors: 0.5 or 0)", default=0.5)
    loops_without_dropout: Count = _knob("ISD-WoT loops that are also trained without dropout", default=3)
    wit_loops_without_dropout: Count = _knob("ISD-WiT loops that are also trained without dropout", default=2)


class Table1Params(IsdParams):
    """Table 1 and Figure 1, which share their runs."""

    section: ClassVar[str] = "table1"
    lambda_zero: Weight = _knob("control: weight of KDIGA's alignment where its target gradient is zero")
    lambda_penalty: Weight = _knob("control: weight of the gradient penalty without a teacher")
    all_seeds_rows: list[str] = _knob("rows trained with every seed, the others with the first; empty: all", default=[])
    long_epochs: Natural = _knob("epochs of one more standard training; 0: no such row", default=0)
    wide_penalty: bool = _knob("control of IGAM: the gradient penalty without a teacher, on IGAM's net", default=False)
    source_tinyimagenet: MaybeDataset = _knob("IGAM's first source task, in the place of TinyImageNet; none: not run")
    source_mnist: MaybeDataset = _knob("IGAM's second source task (Chan et al.: MNIST); none: not run")
    source_mnist_net: ModelName = _knob("net of IGAM's second source teacher")
    source_mnist_checkpoint: CheckpointText = _knob(
        "its published weights, e.g. trades:trades_model_mnist_smallcnn.pt; empty: trained here", default=""
    )
    source_mnist_epsilon: Radius = _knob("radius that it is trained for (Chan et al.: 0.3)")
    head_epochs: Count = _knob("IGAM: epochs of the source teacher's new last layer")


class Table3Params(Table1Params):
    """Table 3: the terms of Proposition 2."""

    section: ClassVar[str] = "table3"
    bound_images: Count = _knob("test images of the bound")
    llm_steps: Count = _knob("steps of the search for the local linearity measure")


class Table4Params(IsdParams):
    """Table 4: ISD with and without head dropout."""

    section: ClassVar[str] = "table4"


class ExploreParams(IsdParams):
    """The explorer: its own trainings and measurements, and the initial values of its controls."""

    section: ClassVar[str] = "explore"
    lambda_penalty: Weight = _knob("control: weight of the gradient penalty without a teacher")
    sweep: list[Weight] = _knob("further weights of the alignment", default=[0.5, 8.0, 32.0])
    sweep_seeds: Count = _knob("on how many of the seeds they are trained", default=1)
    radii: list[Radius] = _knob("further radii at which nets are measured")
    llm_images: Count = _knob("test images of the local linearity measure")
    llm_steps: Count = _knob("steps of its search")
    train_missing: bool = _knob("train what the store lacks when the notebook runs", default=False)
    show_view: Annotated[str, _one_of(VIEWS)] = _knob("the view at the start", default="glance")
    show_method: Annotated[str, _one_of(EXPLORED)] = _knob("the method at the start", default="kdiga")
    show_seed: Natural = _knob("the seed at the start", default=0)
    show_image: Natural = _knob("the test image at the start", default=0)
    show_lambda_iga: Weight | None = _knob("the weight at the start; none: lambda_iga", default=None)
    show_epsilon: Radius | None = _knob("the radius at the start; none: epsilon", default=None)
    show_loop: Count = _knob("the ISD loop at the start", default=1)
    show_dropout: bool = _knob("whether the loops at the start have head dropout", default=True)
    show_compare: list[Annotated[str, _one_of(EXPLORED)]] = _knob(
        "methods that the ε view compares at the start", default=["st", "kd", "kdiga", "trades_student", "isd_wot"]
    )


class Table5Params(Params):
    """Table 5: KDIGA+FGSM."""

    section: ClassVar[str] = "table5"
    fgsm_student: ModelName = _knob("net of Table 5 (the paper: PreActResNet-18)")
    fgsm_epochs: Count = _knob("its epochs (Wong et al.: 15)", default=15)
    fgsm_learning_rate: Positive = _knob("its peak rate, on a one-cycle schedule")
    fgsm_weight_decay: Weight = _knob("its weight decay (Wong et al.: 5e-4)")


class Table2Params(Params):
    """Table 2: between CNNs and vision transformers."""

    section: ClassVar[str] = "table2"
    student_medium: ModelName = _knob("a larger student (the paper: ResNet-34)")
    student_large: ModelName = _knob("the largest student (the paper: ResNet-101)")
    vit: ModelName = _knob("the vision transformer (the paper: ViT-S/16)")
    vit_checkpoint: CheckpointText = _knob("its published weights; empty: trained here", default="")
    vit_base: MaybeModel = _knob("a larger teacher (the paper: ViT-B/16); none: not run", default=NONE)
    vit_large: MaybeModel = _knob("the largest teacher (the paper: ViT-L/16); none: not run", default=NONE)
    deit: MaybeModel = _knob("a distilled teacher (the paper: DeiT-S/16); none: not run", default=NONE)
    vit_epochs: Count = _knob("of the transformer from scratch")
    vit_learning_rate: Positive = _knob("of the transformer from scratch")
    vit_optimizer: Annotated[str, _one_of(OPTIMIZERS)] = _knob("of the transformer", default="adamw")
    vit_weight_decay: Weight = _knob("of the transformer")
    vit_lambda_iga: Weight = _knob("weight of the alignment where the transformer is the student")
    finetune_epochs: Count = _knob("of the fine-tuned transformer")
    finetune_learning_rate: Positive = _knob("of the fine-tuned transformer")
    radii: Radii = _knob("radii of the evaluation attack")


class Table6Params(Table2Params):
    """Table 6: the nets of Table 2 under AutoAttack at several radii."""

    section: ClassVar[str] = "table6"


class AuditParams(Table1Params):
    """The audit of five nets of Table 1."""

    section: ClassVar[str] = "robustness_audit"
    audit_images: Count = _knob("test images of most attacks")
    long_steps: Count = _knob("steps of the long PGD", default=1000)
    long_restarts: Count = _knob("restarts of the long PGD", default=10)
    long_images: Count = _knob("test images of the long PGD")
    black_box_images: Count = _knob("test images of Square and RayS")
    queries: Count = _knob("queries of RayS per image")


class IsdAutoAttackParams(Table1Params):
    """Iterative self-distillation under AutoAttack, loop by loop."""

    section: ClassVar[str] = "isd_autoattack"
    apgd_images: Count = _knob("test images of APGD-CE and APGD-T")
    long_steps: Count = _knob("steps of the long PGD", default=1000)
    long_images: Count = _knob("test images of the long PGD")
    audit_images: Count = _knob("test images of the gradients' norms and cosines")


class Prop1Params(Params):
    """Proposition 1: certified radii of small ReLU nets."""

    section: ClassVar[str] = "prop1_certified"
    certified_epochs: Count = _knob("of the ReLU nets", default=20)
    certified_epsilon: Radius = _knob("radius that is certified")
    certified_images: Count = _knob("test images whose radius is certified", default=200)
    lambda_logits: Weight = _knob("weight of the alignment of all logits", default=0.2)


class Prop2Params(Table3Params):
    """Proposition 2, image by image."""

    section: ClassVar[str] = "prop2_bound"


class AblationParams(Params):
    """A fractional factorial of eight choices, and the two presets side by side."""

    section: ClassVar[str] = "ablations"
    ablation_epochs: Annotated[Count, Field(ge=2)] = _knob(
        "of each combination; the rate decays after a half and three quarters of them", default=8
    )


class AlignmentParams(Table1Params):
    """How much of KDIGA's gain is a gradient penalty: a grid of weights for KDIGA and its controls."""

    section: ClassVar[str] = "alignment_or_penalty"
    grid: Annotated[list[Positive], Field(min_length=1)] = _knob(
        "weights of the alignment and of both penalties", default=[0.3, 1.0, 3.0, 10.0]
    )
    isd_grid: list[Positive] = _knob("weights of the alignment in one loop of ISD-WoT; empty: lambda_isd", default=[])
    teacher_radii: list[Radius] = _knob(
        "radii of the adversarial training of further teachers, weaker ones; 0: standard training", default=[]
    )
    gradient_images: Count = _knob("test images of the gradients' norms and cosines", default=200)


class IsdSearchParams(IsdParams):
    """Seven choices of a self-distillation loop together, then its weight alone, then the best for all loops."""

    section: ClassVar[str] = "isd_search"
    relu_student: MaybeModel = _knob("the student with ReLU for GELU; none: the activation is not varied", default=NONE)
    weights: Annotated[list[Positive], Field(min_length=1)] = _knob(
        "weights of the alignment in one loop from its teacher's weights, with head dropout",
        default=[0.01, 0.1, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0],
    )
    finalists: list[Annotated[int, Field(ge=1, le=16)]] = _knob(
        "combinations (1 to 16) followed for all loops: the best on the held-out training images", default=[]
    )
    apgd_images: Count = _knob("test images of APGD-CE and APGD-T")
    gradient_images: Count = _knob("test images of the gradients' norms and cosines", default=200)


class BaselineParams(Table1Params):
    """KDIGA beside the adversarial distillations since the paper, and beside its controls."""

    section: ClassVar[str] = "baselines"
    lambda_igdm: Weight = _knob(
        "weight of IGDM's difference of logits (its authors: 1 on CIFAR-10, rising)", default=1.0
    )


class ParetoParams(Params):
    """KDIGA+FGSM against fast adversarial training and ARD at its own settings, at the same training cost."""

    section: ClassVar[str] = "pareto"
    fgsm_student: ModelName = _knob("net of the comparison")
    fgsm_epochs: Count = _knob("of KDIGA+FGSM", default=15)
    fgsm_at_epochs: Count = _knob("of fast adversarial training, for the same cost", default=30)
    ard_epochs: Count = _knob("of ARD, for the same cost", default=15)
    apgd_images: Count = _knob("test images of APGD-CE and APGD-T")


class WalkthroughParams(BaseModel):
    """The walkthrough: nets of a few epochs, a few images."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    section: ClassVar[str] = "walkthrough"

    scale: Scale = _knob("the file params/<scale>.yaml")
    dataset: DatasetName = _knob("images in [0, 1]")
    student: ModelName = _knob("net of the student")
    teacher: ModelName = _knob("net of the robust teacher")
    epsilon: Radius = _knob("radius of the ℓ∞ ball")
    images: Count = _knob("test images of the checks", default=8)
    epochs: Count = _knob("of each net")
    device: Device = _knob("auto, cpu or cuda", default="auto")


def subclasses(model: type[BaseModel]) -> list[type[BaseModel]]:
    """The model and every model derived from it."""
    return [model, *(derived for child in model.__subclasses__() for derived in subclasses(child))]


def models() -> dict[str, type[BaseModel]]:
    """Every section that a scale's file may have, and its model."""
    every = [*subclasses(Params), WalkthroughParams]
    return {model.section: model for model in every if model.section}  # pyright: ignore[reportAttributeAccessIssue]


def faults(error: ValidationError, model: type[BaseModel]) -> list[str]:
    """One line per fault: key, what is wrong, what was given."""
    lines = []
    for fault in error.errors():
        key = ".".join(str(part) for part in fault["loc"])
        if fault["type"] == "extra_forbidden":
            lines.append(unknown_key(key, model.model_fields))
            continue
        if fault["type"] == "missing":
            lines.append(f"{key}: is missing")
            continue
        message = fault["msg"].removeprefix("Value error, ")
        message = message[0].lower() + message[1:]
        lines.append(f"{key}: {message}, got {fault['input']!r}" if key else message)
    return lines


def unknown_key(key: str, known: Iterable[str]) -> str:
    """The message for an unknown key."""
    names = list(known)
    return f"{key}: unknown key{did_you_mean(key, names)}; known are {', '.join(names)}"


def build(model: type[P], values: Mapping[str, Any], source: str) -> P:
    """The parameters, or a ``ParameterError`` whose lines all start with ``source``."""
    try:
        return model(**values)
    except ValidationError as error:
        raise ParameterError("\n".join(f"{source}: {line}" for line in faults(error, model))) from None


# ---- the layers ----


def scales() -> list[str]:
    """The names of the files in ``params/``."""
    return sorted(path.stem for path in paths.PARAMS.glob("*.yaml"))


def at_scale(model: type[P], scale: str, overrides: Mapping[str, Any] | None = None) -> P:
    """A model's parameters at a scale, with single settings in ``overrides`` on top.

    Raises:
        ParameterError: no such scale, or a key or value that cannot be used.
    """
    return _layered(model, {"scale": scale} | dict(overrides or {}), f"params/{scale}.yaml")


def read(model: type[P], path: Path, overrides: Mapping[str, Any] | None = None) -> P:
    """The parameters of a YAML file: ``scale``, ``settings`` and single settings, with ``overrides`` on top.

    A key ``artefact`` is allowed and ignored here; the command reads it.
    """
    source = str(path.relative_to(paths.ROOT)) if path.is_relative_to(paths.ROOT) else str(path)
    values = load_yaml(path, source)
    values.pop("artefact", None)
    return _layered(model, values | dict(overrides or {}), source)


def load_yaml(path: Path, source: str) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        ParameterError: there is none; the message starts with ``source``.
    """
    try:
        values = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise ParameterError(f"{source}: there is no such file") from None
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise ParameterError(f"{source}: not readable as YAML ({str(error).splitlines()[0]})") from None
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ParameterError(f"{source}: must hold a mapping of parameter names to values")
    return values


def _layered(model: type[P], values: Mapping[str, Any], source: str) -> P:
    """The parameters of ``values`` (single settings, with ``scale`` and perhaps ``settings`` among them)."""
    singles = dict(values)
    scale, settings = singles.get("scale", "digits"), singles.pop("settings", None)
    shipped = scales()
    if scale not in shipped:
        hint = did_you_mean(scale, shipped)
        raise ParameterError(f"{source}: scale: must be one of {', '.join(shipped)}{hint}, got {scale!r}")
    name = f"params/{scale}.yaml"
    layers = _settings(model, _scale_file(scale)["settings"], name)
    layers |= _settings(model, settings or {}, source)
    return build(model, layers | {"scale": scale} | singles, source)


@lru_cache
def _scale_file(scale: str) -> dict[str, Any]:
    source = f"params/{scale}.yaml"
    values = load_yaml(paths.params(scale), source)
    if set(values) != {"scale", "settings"} or values["scale"] != scale:
        raise ParameterError(f"{source}: must hold scale: {scale}, settings: and nothing else")
    return values


def _settings(model: type[BaseModel], settings: Any, source: str) -> dict[str, Any]:
    """The values for a model in ``settings``: the common ones, then those of the model's section.

    A common setting may belong to any artefact; a section may hold settings of its own artefact only.
    """
    if not isinstance(settings, dict) or not all(isinstance(key, str) for key in settings):
        raise ParameterError(f"{source}: settings: must hold a mapping of names to values")
    every = models()
    known = dict.fromkeys(name for one in every.values() for name in one.model_fields)
    lines = []
    for key, value in settings.items():
        if key in every:
            own = value if isinstance(value, dict) else {}
            lines += [f"{key}: must hold a mapping of names to values"] if not isinstance(value, dict) else []
            foreign = [name for name in own if name not in every[key].model_fields]
            lines += [f"{key}: {unknown_key(name, every[key].model_fields)}" for name in foreign]
        elif key not in known:
            lines.append(unknown_key(key, [*known, *every]))
    if lines:
        raise ParameterError("\n".join(f"{source}: {line}" for line in lines))
    common = {key: value for key, value in settings.items() if key in model.model_fields and key not in every}
    return common | settings.get(model.section, {})  # pyright: ignore[reportAttributeAccessIssue]


def describe_settings(model: type[BaseModel], scale: str) -> list[dict[str, Any]]:
    """Every setting of a model: name, value at the scale, default (None: every scale gives one), allowed, meaning."""
    values = at_scale(model, scale).model_dump()
    schema = model.model_json_schema()["properties"]
    return [
        {
            "name": name,
            "value": values[name],
            "default": None if field.is_required() else field.default,
            "allowed": " ".join([_allowed(schema[name]), *_limits(field.metadata)]),
            "meaning": field.description,
        }
        for name, field in model.model_fields.items()
    ]


def _allowed(schema: Mapping[str, Any]) -> str:
    """Type and limits of a setting in words."""
    if "anyOf" in schema:
        return " or ".join(_allowed(part) for part in schema["anyOf"])
    if "enum" in schema:
        return "one of " + ", ".join(schema["enum"])
    if schema.get("type") == "array":
        return f"list of {_allowed(schema['items'])}s"
    words = {"number": "number", "integer": "whole number", "boolean": "true or false", "null": "none"}
    return words.get(schema.get("type", ""), "text")


def _limits(metadata: Iterable[Any]) -> list[str]:
    """The limits of a number, as a field's metadata hold them."""
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    return [f"{sign} {getattr(one, key):g}" for one in metadata for key, sign in signs.items() if hasattr(one, key)]


# ---- in a notebook ----

_KERNEL_NAMES = {"In", "Out", "exit", "quit", "get_ipython", "open"}


def from_notebook(model: type[P], namespace: Mapping[str, Any]) -> P:
    """The parameters of a running notebook, from its ``globals()``.

    Parameters are the names that the ``parameters`` cell and papermill's injected cell assign, so a notebook can run
    again in the same kernel. A misspelt injected name is an unknown key. None means the scale's value.
    """
    values = {name: namespace[name] for name in _assigned(namespace)}
    unknown = [name for name in values if name not in model.model_fields and name != "settings"]
    if unknown:
        lines = [unknown_key(name, model.model_fields) for name in unknown]
        raise ParameterError("\n".join(f"notebook parameters: {line}" for line in lines))
    return _layered(model, {k: v for k, v in values.items() if v is not None}, "notebook parameters")


def _assigned(namespace: Mapping[str, Any]) -> list[str]:
    """The names that the parameter cells assign: the cell run last that assigns ``scale``, and the one after it."""
    cells = [_literals(cell) for cell in namespace.get("In", [])]
    starts = [index for index, names in enumerate(cells) if "scale" in names and "settings" in names]
    if starts:
        last = starts[-1]
        return list(dict.fromkeys(cells[last] + (cells[last + 1] if last + 1 < len(cells) else [])))
    # Outside IPython, and under nbval, there is no history: every plain value in the namespace is a parameter, except
    # private names and constants that a cell imported.
    plain = bool | int | float | str | list | tuple | dict
    return [
        name
        for name, value in namespace.items()
        if not (name.startswith("_") or name.isupper() or name in _KERNEL_NAMES)
        and (value is None or isinstance(value, plain))
    ]


def _literals(cell: str) -> list[str]:
    """The names that a cell assigns if it does nothing but assign plain values, else none."""
    names = []
    try:
        for node in ast.parse(cell).body:
            target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
            value = getattr(node, "value", None)
            if not isinstance(target, ast.Name) or value is None:
                return []
            ast.literal_eval(value)
            names.append(target.id)
    except (ValueError, SyntaxError):
        return []
    return names


def parse_override(text: str) -> tuple[str, Any]:
    """``lambda_iga=3`` as a name and a value, as papermill's ``-p`` reads it."""
    name, separator, value = text.partition("=")
    if not separator or not name:
        raise ParameterError(f"{text!r}: an override is written NAME=VALUE")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value
