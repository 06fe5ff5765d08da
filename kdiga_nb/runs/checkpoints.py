"""``Checkpoint``: weights from outside the store, as files or URLs, in the forms that published ones come in.

Files are read without running anything in them (``weights_only``), checked against their sha256 where one is given, and
brought to the layer names of ``models``: a prefix that a wrapper left is cut, an unused stage dropped, the last layer
called ``head``, a normaliser inside the file taken over. What then does not fit the net is named.
"""

import hashlib
import http.client
import json
import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlparse

import safetensors.torch
import torch
from filelock import FileLock
from torch import Tensor, nn

from kdiga_nb import paths
from kdiga_nb.data import DATASETS, load_data
from kdiga_nb.models import MODELS, build_model, published_weights, timm_names

# Per format: (pattern, replacement) for the names in a file; None drops the entry. Formats without rules must already
# have this kit's names.
RULES: dict[str, list[tuple[str, str | None]]] = {
    # github.com/yaodongyu/TRADES: a wide ResNet with a stage that its forward pass leaves out, and SmallCNN.
    "trades": [
        (r"^module\.", ""),
        (r"^sub_block1\.", None),
        (r"^feature_extractor\.", ""),
        (r"^classifier\.fc3\.", "head."),
        (r"^classifier\.", ""),
        (r"^fc\.", "head."),
    ],
    # github.com/MadryLab/robustness: the net and its normaliser in an "attacker model", which holds both twice.
    "robustness": [
        (r"^module\.", ""),
        (r"^attacker\.", None),
        (r"^normalizer\.new_", "normalize."),
        (r"^model\.", ""),
    ],
    # github.com/RobustBench/robustbench: many authors' files.
    "robustbench": [
        (r"^module\.", ""),
        (r"^model\.", ""),
        (r"^mu$", "normalize.mean"),
        (r"^sigma$", "normalize.std"),
        (r"^sub_block1\.", None),
        (r"^(fc|linear)\.", "head."),
    ],
    "timm": [],
}
FORMATS = ("state_dict", "safetensors", *RULES)
# OWNER/NAME/FILE of the Hugging Face hub at a commit, so that the file cannot change.
HUB = re.compile(r"hf:(?P<repo>[\w.-]+/[\w.-]+)/(?P<file>[\w./-]+)@(?P<revision>[0-9a-f]{40})")


@dataclass(frozen=True)
class Known:
    """A published robust net: how parameters write it, and where its file is had from; perhaps its sha256."""

    format: str
    path: str
    source: str
    sha256: str | None = None


KNOWN = {
    "trades_wrn_34_10": Known("trades", "model_cifar_wrn.pt", "the README of github.com/yaodongyu/TRADES"),
    "trades_mnist": Known(
        "trades",
        "trades_model_mnist_smallcnn.pt",
        "model_mnist_smallcnn.pt of the README of github.com/yaodongyu/TRADES",
        "5b99888064f692047d5592b38df2dde126aa1b991a26c6aad683ce709634bea0",
    ),
}
# Where a file that was saved during training keeps the weights.
WRAPPERS = ("state_dict", "model_state_dict", "model", "net")
PUBLISHED = "published"
ATTEMPTS = 3  # of a download that breaks off; each attempt resumes


class StoreError(RuntimeError):
    """The run store, or a checkpoint file, cannot be used; the message says why in one line."""


@dataclass(frozen=True)
class Checkpoint:
    """Weights from outside the store, used as a teacher or as a starting point.

    Attributes:
        path: a local file (``paths.checkpoints()`` is searched too), a URL, ``hf:OWNER/NAME/FILE@COMMIT`` of the
            Hugging Face hub, or, for the format ``timm``, ``published``: what timm itself serves for the net.
        sha256: of the file; checked when given.
        format: ``state_dict`` (a torch file, loaded with ``weights_only``) or ``safetensors``, with this kit's layer
            names; ``trades``, ``robustness``, ``robustbench`` or ``timm`` for files of those projects.
        model: the name of the net in ``models.MODELS`` and, joined by a colon, the data set whose image shape and
            classes it was built for, as in ``digits_wide:digits``.
    """

    path: str
    sha256: str | None = None
    format: str = "state_dict"
    model: str | None = None

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {self.format!r}")

    @property
    def dataset(self) -> str:
        """The data set that the net was built for."""
        return (self.model or "").partition(":")[2]


def parse(text: str, model: str) -> Checkpoint:
    """A checkpoint as parameters write it: ``FORMAT:PATH_OR_URL`` or a name of ``KNOWN``, perhaps with ``#sha256=…``.

    Raises:
        ValueError: it is not written so, or a known net's sha256 is needed.
    """
    name, marked, digest = text.partition("#sha256=")
    kind, _, path = name.partition(":")
    known = KNOWN.get(name)
    if known is not None:
        kind, path = known.format, known.path
        if not digest and known.sha256 is None:
            raise ValueError(f"{name}: the kit does not know its sha256; write {name}#sha256=… ({known.source})")
    well_placed = path and (not path.startswith("hf:") or HUB.fullmatch(path))
    if kind not in FORMATS or not well_placed or (marked and not re.fullmatch(r"[0-9a-f]{64}", digest)):
        raise ValueError(
            f"must be FORMAT:PATH_OR_URL[#sha256=64 hexadecimal digits], FORMAT one of {', '.join(FORMATS)}, "
            f"PATH_OR_URL also hf:OWNER/NAME/FILE@40 hexadecimal digits; or one of {', '.join(KNOWN)}"
        )
    return Checkpoint(path, digest or (known.sha256 if known else None), kind, model)


def described(path: Path) -> Checkpoint:
    """The checkpoint of a file that ``kdiga export`` wrote: the record next to it has net, data set and sha256.

    Raises:
        StoreError: there is no record, or it cannot be used.
    """
    beside = path.with_suffix(".json")
    try:
        record = json.loads(beside.read_text())
        return Checkpoint(str(path), str(record["sha256"]), "safetensors", str(record["model"]))
    except FileNotFoundError:
        raise StoreError(f"{path}: --model must name its net and data set, for there is no {beside.name}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{beside}: not the record of a checkpoint ({type(error).__name__}: {error})") from None


def digest_of(path: Path) -> str:
    """A file's sha256."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def rounded(weights: dict[str, Tensor], what: str) -> dict[str, Tensor]:
    """Weights in float16; statistics of batch normalisation stay in float32.

    Raises:
        StoreError: a weight is too large for float16; ``what`` names the net.
    """
    half = {
        name: value.half() if value.is_floating_point() and ".running_" not in f".{name}" else value
        for name, value in weights.items()
    }
    for name, value in half.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise StoreError(f"{what}: {name} does not fit into float16")
    return half


def is_url(path: str) -> bool:
    """Whether a checkpoint's path has to be downloaded."""
    return urlparse(path).scheme in ("http", "https", "hf")


def locate(checkpoint: Checkpoint) -> Path:
    """The checkpoint's file, downloaded if necessary, with its sha256 checked.

    Raises:
        StoreError: the file is missing, cannot be downloaded or has another sha256.
    """
    path = Path(checkpoint.path)
    if (hub := HUB.fullmatch(checkpoint.path)) is not None:
        path = _from_hub(checkpoint, hub)
    elif is_url(checkpoint.path):
        path = _fetched(checkpoint)
    elif not path.is_file():
        path = paths.checkpoints() / path
        if not path.is_file():
            had = [f"; it is had from {one.source}" for one in KNOWN.values() if one.path == checkpoint.path]
            raise StoreError(f"checkpoint {checkpoint.path}: there is no such file, nor {path}{''.join(had)}")
    if checkpoint.sha256 is not None and (digest := digest_of(path)) != checkpoint.sha256:
        raise StoreError(f"checkpoint {checkpoint.path}: its sha256 is {digest}, not {checkpoint.sha256}")
    return path


def load(checkpoint: Checkpoint) -> nn.Module:
    """The checkpoint's net with its weights, on the CPU.

    Raises:
        StoreError: the file is missing, unreadable or does not fit the net; the message names the first mismatch.
    """
    name, dataset = (checkpoint.model or "").partition(":")[0], checkpoint.dataset
    if not dataset:
        raise StoreError(
            f"checkpoint {checkpoint.path}: model must name a net and a data set, as in digits_wide:digits"
        )
    data = load_data(dataset)
    model = build_model(name, num_classes=data.num_classes, image_shape=data.image_shape)
    wanted = model.state_dict()
    if checkpoint.format == "timm" and checkpoint.path == PUBLISHED:
        with _in_one_line(checkpoint):
            state = published_weights(name, data.image_shape)
    else:
        state = _read(checkpoint)
    if checkpoint.format in RULES:
        state = _renamed(state, checkpoint.format, name)
        if (classes := DATASETS[dataset].imagenet_classes) and len(state.get("head.bias", ())) == 1000:
            rows = torch.tensor(classes)
            state |= {key: state[key][rows] for key in ("head.weight", "head.bias")}
        # Old files lack BatchNorm's batch counter, and most have no normaliser.
        optional = {k for k in wanted if k.startswith("normalize.") or k.endswith("num_batches_tracked")}
        state = {k: v for k, v in wanted.items() if k in optional} | state
    for key in [*wanted, *state]:
        if key not in state or key not in wanted:
            problem = "is missing" if key in wanted else f"is not part of {name}"
            raise StoreError(f"checkpoint {checkpoint.path}: {key} {problem}")
        if state[key].shape != wanted[key].shape:
            shapes = f"{tuple(state[key].shape)}, not {tuple(wanted[key].shape)}"
            raise StoreError(f"checkpoint {checkpoint.path}: {key} has shape {shapes}")
    model.load_state_dict(state)
    return model


@contextmanager
def _in_one_line(checkpoint: Checkpoint) -> Iterator[None]:
    """Any failure of a foreign file or a hub becomes a one-line StoreError."""
    try:
        yield
    except Exception as error:
        reason = f"not a {checkpoint.format} file ({error})".splitlines()[0]
        raise StoreError(f"checkpoint {checkpoint.path}: {reason}") from error


def _read(checkpoint: Checkpoint) -> dict[str, Tensor]:
    path = locate(checkpoint)
    with _in_one_line(checkpoint):
        if checkpoint.format == "safetensors" or path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    if checkpoint.format in RULES and isinstance(state, dict):
        state = next((state[key] for key in WRAPPERS if isinstance(state.get(key), dict)), state)
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise StoreError(f"checkpoint {checkpoint.path}: not a state_dict, a mapping of names to tensors")
    return state


def _renamed(state: dict[str, Tensor], kind: str, net: str) -> dict[str, Tensor]:
    """The entries under our names, the normaliser in our shape."""
    renamed: dict[str, Tensor] = {}
    for name, value in state.items():
        new: str | None = name
        for pattern, replacement in RULES[kind]:
            if new is not None and re.match(pattern, new):
                new = None if replacement is None else re.sub(pattern, replacement, new)
        if new is not None:
            renamed[new] = value.view(1, -1, 1, 1) if new in ("normalize.mean", "normalize.std") else value
    if MODELS[net].timm and not any(name.startswith("encoder.") for name in renamed):
        normaliser = {k: v for k, v in renamed.items() if k.startswith("normalize.")}
        return timm_names({k: v for k, v in renamed.items() if k not in normaliser}) | normaliser
    return renamed


def _from_hub(checkpoint: Checkpoint, hub: re.Match[str]) -> Path:
    """A file of the Hugging Face hub, downloaded once into ``paths.checkpoints()``."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    cache = paths.checkpoints() / "hub"
    try:
        return Path(hf_hub_download(hub["repo"], hub["file"], revision=hub["revision"], cache_dir=cache))
    except LocalEntryNotFoundError:
        raise StoreError(f"checkpoint {checkpoint.path}: it is not in {cache}, and the hub cannot be reached") from None
    except (HfHubHTTPError, OSError) as error:
        raise StoreError(f"checkpoint {checkpoint.path}: {str(error).splitlines()[0]}") from error


def _fetched(checkpoint: Checkpoint) -> Path:
    """A URL's file in ``paths.checkpoints()``, downloaded once; an interrupted download resumes."""
    url = checkpoint.path
    name = f"{hashlib.sha256(url.encode()).hexdigest()[:8]}-{Path(urlparse(url).path).name or 'weights'}"
    path = paths.checkpoints() / name
    partial = path.with_name(f"{name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            if not path.exists():
                _download(url, partial)
                if checkpoint.sha256 is not None and digest_of(partial) != checkpoint.sha256:
                    digest = digest_of(partial)
                    partial.unlink()
                    raise StoreError(f"checkpoint {url}: what was fetched has sha256 {digest}, not {checkpoint.sha256}")
                partial.replace(path)
    except OSError as error:
        raise StoreError(f"checkpoint {url}: {error}") from error
    return path


def _download(url: str, partial: Path) -> None:
    """Append what is missing of a URL's content to ``partial``."""
    for attempt in range(1, ATTEMPTS + 1):
        there = partial.stat().st_size if partial.exists() else 0
        try:
            total = _append(url, partial, there)
        except (OSError, http.client.HTTPException) as error:
            # HTTP 416: nothing left to download.
            if isinstance(error, urllib.error.HTTPError) and error.code == 416 and there:
                return
            reason = f"{type(error).__name__}: {error}"
        else:
            if total is None or partial.stat().st_size == total:
                return
            reason = "the connection ended early"
        if attempt == ATTEMPTS:
            have = partial.stat().st_size if partial.exists() else 0
            raise StoreError(f"checkpoint {url}: {reason}; {have} bytes are kept, the next attempt resumes there")


def _append(url: str, partial: Path, there: int) -> int | None:
    """Fetch everything after the first ``there`` bytes; the length of the whole file, if the server sends it."""
    request = urllib.request.Request(url, headers={"Range": f"bytes={there}-"} if there else {})
    with urllib.request.urlopen(request, timeout=60) as response:
        resumed = response.status == 206
        length = response.headers.get("Content-Length")
        with partial.open("ab" if resumed else "wb") as file:
            while block := response.read(1 << 20):
                file.write(block)
    return None if length is None else int(length) + (there if resumed else 0)
