"""Published weights: every form that files come in, what does not fit, downloads that break off, and a real file."""

import hashlib
import http.server
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from torch import Tensor, nn

from kdiga_nb import paths
from kdiga_nb.attacks.gradient import PGD
from kdiga_nb.data import IMAGENETTE_CLASSES, load_data
from kdiga_nb.measures import TestAccuracy
from kdiga_nb.metrics import accuracy
from kdiga_nb.models import MODELS, build_model
from kdiga_nb.runs import checkpoints
from kdiga_nb.runs.checkpoints import Checkpoint, StoreError, load, locate, parse
from kdiga_nb.runs.graph import Job, title
from kdiga_nb.runs.store import is_finished, load_or_train, measure, measured

State = dict[str, Tensor]
REAL = "trades_model_mnist_smallcnn.pt"
REAL_SHA256 = "5b99888064f692047d5592b38df2dde126aa1b991a26c6aad683ce709634bea0"


@pytest.fixture(autouse=True)
def small_data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Data roots of one's own; the nets below are built for digits, whose images are part of a dependency."""
    monkeypatch.setenv("KDIGA_DATA", str(tmp_path / "data"))


def fresh(name: str, seed: int = 1) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build_model(name, num_classes=10, image_shape=(1, 8, 8))


def saved(tmp_path: Path, content: object) -> str:
    torch.save(content, tmp_path / "file.pt")
    return str(tmp_path / "file.pt")


def same_logits(ours: nn.Module, theirs: nn.Module) -> bool:
    x = load_data("digits").test.images[:4]
    return torch.equal(ours.eval()(x), theirs.eval()(x))


# ---- the forms ----


def as_trades(state: State) -> State:
    """A wide ResNet as TRADES' authors save it: under DataParallel, ``fc``, and a stage that nothing uses."""
    plain = {k.replace("head.", "fc."): v for k, v in state.items() if not k.startswith("normalize.")}
    unused = {k.replace("block1.", "sub_block1."): v for k, v in plain.items() if k.startswith("block1.")}
    return {f"module.{k}": v for k, v in (plain | unused).items()}


def as_robustbench(state: State) -> State:
    """With the normaliser as ``mu`` and ``sigma`` (C, 1, 1), and without BatchNorm's counters, as old files are."""
    plain = {k.replace("head.", "linear."): v for k, v in state.items() if not k.startswith("normalize.")}
    plain = {k: v for k, v in plain.items() if "num_batches" not in k}
    return plain | {"mu": state["normalize.mean"].squeeze(0), "sigma": state["normalize.std"].squeeze(0)}


def as_robustness(state: State) -> State:
    """Net and normaliser twice inside an attacker model, ImageNet nets under torchvision's names."""
    net = {k.removeprefix("encoder.").replace("head.", "fc."): v for k, v in state.items() if "normalize" not in k}
    body = {f"module.model.{k}": v for k, v in net.items()}
    body |= {f"module.normalizer.new_{k}": state[f"normalize.{k}"].squeeze(0) for k in ("mean", "std")}
    return body | {k.replace("module.", "module.attacker."): v for k, v in body.items()}


FORMS: list[tuple[str, str, Callable[[State], State]]] = [
    ("trades", "wrn_28_10", as_trades),
    ("robustbench", "preact_resnet18", as_robustbench),
    ("robustness", "resnet18", as_robustness),
]


@pytest.mark.parametrize(("kind", "net", "write"), FORMS, ids=[kind for kind, *_ in FORMS])
@pytest.mark.parametrize("wrapper", [None, "state_dict", "model"])
def test_a_file_as_others_write_it_gives_the_same_net(
    kind: str, net: str, write: Callable[[State], State], wrapper: str | None, tmp_path: Path
) -> None:
    original = fresh(net)
    original.get_submodule("normalize").load_state_dict(
        {"mean": torch.full((1, 1, 1, 1), 0.25), "std": torch.full((1, 1, 1, 1), 0.5)}
    )
    state = write(original.state_dict())
    if kind == "trades":  # its nets see the pixels as they are
        original.get_submodule("normalize").load_state_dict(fresh(net).get_submodule("normalize").state_dict())
    path = saved(tmp_path, {wrapper: state, "epoch": 90} if wrapper else state)
    assert same_logits(load(Checkpoint(path, format=kind, model=f"{net}:digits")), original)


def test_timms_own_names(tmp_path: Path) -> None:
    theirs = timm.create_model(str(MODELS["resnet18"].timm), num_classes=10, in_chans=1)
    ours = load(Checkpoint(saved(tmp_path, theirs.state_dict()), format="timm", model="resnet18:digits"))
    assert torch.equal(ours.get_parameter("head.weight"), theirs.get_parameter("fc.weight"))
    assert torch.equal(ours.get_parameter("encoder.conv1.weight"), theirs.get_parameter("conv1.weight"))


@pytest.mark.skipif(not (paths.data() / "imagenette2-160").is_dir(), reason="no imagenette2-160 under KDIGA_DATA")
def test_a_thousand_classes_become_imagenettes_ten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    theirs = timm.create_model(str(MODELS["resnet18"].timm))
    ours = load(Checkpoint(saved(tmp_path, theirs.state_dict()), format="timm", model="resnet18:imagenette"))
    rows = torch.tensor(IMAGENETTE_CLASSES)
    assert torch.equal(ours.get_parameter("head.weight"), theirs.get_parameter("fc.weight")[rows])


# ---- what does not fit ----


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"module.conv1.weight": torch.zeros(1)}, r"conv1\.weight has shape \(1,\), not \(64, 1, 3, 3\)|is missing"),
        ({"state_dict": {"layer9.weight": torch.zeros(1)}}, "is missing|layer9.weight is not part of preact_resnet18"),
        ({"epoch": 3}, "not a state_dict"),
        ([1, 2], "not a state_dict"),
        (hashlib.sha256, "not a robustbench file"),
    ],
    ids=["shape", "names", "no weights", "a list", "code"],
)
def test_what_does_not_fit_is_named_in_one_line(content: object, says: str, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=says) as error:
        load(Checkpoint(saved(tmp_path, content), format="robustbench", model="preact_resnet18:digits"))
    assert "\n" not in str(error.value)


def test_a_file_of_another_net_names_the_first_mismatch(tmp_path: Path) -> None:
    path = saved(tmp_path, as_trades(fresh("wrn_28_10").state_dict()))
    with pytest.raises(StoreError, match=r"conv1\.weight has shape \(16, 1, 3, 3\), not \(32, 1, 3, 3\)"):
        load(Checkpoint(path, format="trades", model="mobilenet_v2:digits"))


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    path = Path(saved(tmp_path, fresh("trades_mnist").state_dict()))
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(StoreError, match="not a trades file"):
        load(Checkpoint(str(path), format="trades", model="trades_mnist:digits"))


def test_a_bare_name_is_looked_for_among_the_data(tmp_path: Path) -> None:
    paths.checkpoints().mkdir(parents=True)
    (paths.checkpoints() / "teacher.pt").write_bytes(b"weights")
    assert locate(Checkpoint("teacher.pt")) == paths.checkpoints() / "teacher.pt"
    with pytest.raises(StoreError, match=r"other\.pt: there is no such file, nor .*other.pt"):
        locate(Checkpoint("other.pt"))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("trades:a/b.pt", Checkpoint("a/b.pt", None, "trades", "wrn_34_10:cifar10")),
        (
            f"robustness:https://host/x.pt#sha256={'0' * 64}",
            Checkpoint("https://host/x.pt", "0" * 64, "robustness", "wrn_34_10:cifar10"),
        ),
        ("timm:published", Checkpoint("published", None, "timm", "wrn_34_10:cifar10")),
    ],
)
def test_a_checkpoint_as_parameters_write_it(text: str, found: Checkpoint) -> None:
    assert parse(text, "wrn_34_10:cifar10") == found


@pytest.mark.parametrize("text", ["model.pt", "pickle:model.pt", "trades:", "trades:a.pt#sha256=123", "https://host/a"])
def test_a_checkpoint_written_otherwise_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="must be FORMAT:PATH_OR_URL"):
        parse(text, "wrn_34_10:cifar10")


# ---- downloads ----


class Server(http.server.ThreadingHTTPServer):
    """Serves one file, byte ranges too, and hangs up after ``budget`` bytes as often as ``deaths`` says."""

    content = bytes(range(256)) * 4000
    deaths = 0
    budget = 300_000
    requests: list[str | None]


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_GET(self) -> None:
        asked = self.headers.get("Range")
        self.server.requests.append(asked)
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked else 0
        body = self.server.content[start:]
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.server.deaths:
            self.server.deaths -= 1
            body = body[: self.server.budget]
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Silent."""


@pytest.fixture
def server() -> Iterator[Server]:
    with Server(("127.0.0.1", 0), Handler) as found:
        found.requests = []
        threading.Thread(target=found.serve_forever, daemon=True).start()
        yield found
        found.shutdown()


def at(server: Server, digest: str | None = None) -> Checkpoint:
    return Checkpoint(f"http://127.0.0.1:{server.server_port}/weights/teacher.pt", digest)


def test_a_file_is_fetched_once_and_kept_among_the_data(server: Server) -> None:
    digest = hashlib.sha256(server.content).hexdigest()
    path = locate(at(server, digest))
    assert path.read_bytes() == server.content and path.parent == paths.checkpoints()
    assert locate(at(server, digest)) == path and server.requests == [None]


def test_a_download_that_breaks_off_goes_on_where_it_stopped(server: Server) -> None:
    server.deaths = 2
    assert locate(at(server)).read_bytes() == server.content
    assert server.requests == [None, "bytes=300000-", "bytes=600000-"]


def test_a_download_that_keeps_breaking_off_is_taken_up_by_the_next_start(server: Server) -> None:
    server.deaths, server.budget = 3, 100_000
    with pytest.raises(StoreError, match="300000 bytes are kept, the next attempt resumes there"):
        locate(at(server))
    assert locate(at(server)).read_bytes() == server.content
    assert server.requests[-1] == "bytes=300000-"


def test_another_file_than_expected_is_not_kept(server: Server) -> None:
    with pytest.raises(StoreError, match=r"what was fetched has sha256 .*, not aaaa"):
        locate(at(server, "a" * 64))
    assert [path.suffix for path in paths.checkpoints().iterdir()] in ([], [".lock"])


def test_a_server_that_is_not_there_is_said_in_one_line() -> None:
    with pytest.raises(StoreError, match=r"http://127.0.0.1:1/x\.pt: .*refused") as error:
        locate(Checkpoint("http://127.0.0.1:1/x.pt"))
    assert "\n" not in str(error.value)


# ---- the real one: TRADES' net for MNIST ----


@pytest.fixture
def real(monkeypatch: pytest.MonkeyPatch) -> Checkpoint:
    monkeypatch.undo()  # back to the data root of this machine
    if not (paths.checkpoints() / REAL).is_file() or not (paths.data() / "MNIST").is_dir():
        pytest.skip(f"no checkpoints/{REAL} or no MNIST under KDIGA_DATA")
    return Checkpoint(REAL, REAL_SHA256, "trades", "trades_mnist:mnist")


def test_trades_mnist_net_has_its_published_accuracy(real: Checkpoint) -> None:
    data = load_data("mnist")
    net = load_or_train(real)
    clean = accuracy(net, data.test.images, data.test.labels)
    assert clean.percent == pytest.approx(99.48, abs=0.005) and clean.n == 10_000
    # On all images PGD-40 leaves between 95 and 97 %; here, on the first 200, that range must lie inside the interval.
    robust = accuracy(net, *(part[:200] for part in data.test), attack=PGD(0.3, 0.01, 40))
    assert robust.low < 96 < robust.high


def test_a_published_net_is_measured_and_remembered_like_a_run(
    real: Checkpoint, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("KDIGA_RUNS", str(tmp_path / "runs"))
    job = Job(real, TestAccuracy(None, 200))
    assert is_finished(real) and job.needs() == [] and not job.is_done()
    assert title(job) == "measure trades_mnist:mnist, trades file"
    found = measure(real, TestAccuracy(None, 200))
    assert job.is_done() and measured(real, TestAccuracy(None, 200)) == found


def test_igams_source_teacher_keeps_its_body_on_cifar10(real: Checkpoint) -> None:
    """Its weights fit the same net built for colour images of 32×32."""
    body = checkpoints.load(real).state_dict()
    net = build_model("trades_mnist", num_classes=10, image_shape=(3, 32, 32))
    net.load_state_dict(body)
    assert net(torch.rand(2, 3, 32, 32)).shape == (2, 10)


# ---- nets of the Hugging Face hub, and nets that the kit knows by name ----

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_a_net_of_the_hub_is_read_from_its_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's own library finds the file where it would have put it; nothing is asked for over the network."""
    monkeypatch.setattr(paths, "checkpoints", lambda: tmp_path)
    original = fresh("digits_small")
    file = tmp_path / "hub" / "models--someone--nets" / "snapshots" / COMMIT / "robust" / "model.safetensors"
    file.parent.mkdir(parents=True)
    safetensors.torch.save_file(original.state_dict(), file)
    text = f"safetensors:hf:someone/nets/robust/model.safetensors@{COMMIT}"
    assert same_logits(load(parse(text, "digits_small:digits")), original)
    wrong = parse(f"{text}#sha256={'0' * 64}", "digits_small:digits")
    with pytest.raises(StoreError, match=r"its sha256 is [0-9a-f]{64}, not 0{64}"):
        load(wrong)


def test_a_net_of_the_hub_without_a_network_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paths, "checkpoints", lambda: tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    missing = parse(f"safetensors:hf:someone/nets/model.safetensors@{COMMIT}", "digits_small:digits")
    with pytest.raises(StoreError, match=r"^checkpoint hf:someone/.* is not in .*, and the hub cannot be reached$"):
        load(missing)


@pytest.mark.parametrize("place", ["hf:someone/nets/file.pt", "hf:nets/file.pt@" + COMMIT, "hf:a/b/c.pt@main"])
def test_a_net_of_the_hub_without_a_commit_is_refused(place: str) -> None:
    with pytest.raises(ValueError, match="hf:OWNER/NAME/FILE@40 hexadecimal digits"):
        parse(f"trades:{place}", "wrn_34_10:cifar10")


def test_known_nets_by_name() -> None:
    known = parse("trades_mnist", "trades_mnist:mnist")
    assert (known.format, known.path) == ("trades", REAL) and known.sha256 is not None
    with pytest.raises(ValueError, match="does not know its sha256; write trades_wrn_34_10#sha256="):
        parse("trades_wrn_34_10", "wrn_34_10:cifar10")
    assert parse(f"trades_wrn_34_10#sha256={'a' * 64}", "wrn_34_10:cifar10").sha256 == "a" * 64
    with pytest.raises(ValueError, match="or one of trades_wrn_34_10, trades_mnist"):
        parse("trades_wrn", "wrn_34_10:cifar10")
