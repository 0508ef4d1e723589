"""A registered model is one file that anyone can load: same scores, no pickle, none of our code needed."""

import contextlib
import importlib.metadata
import io
import json
import logging
import os
import socket
import subprocess
import sys
import time
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from torch import nn

from pipeline import registry, tracking
from pipeline.config import InputError
from pipeline.registry import Registered, load, register, weights_digest
from pipeline.server import serve

# MLflow 3.17.2 with SQLAlchemy 2.1, and its own type hints: theirs to mend, each said once a process.
NOISE = (
    ("The ``noload`` loader strategy is deprecated", DeprecationWarning),
    (r".*Any type hint is inferred as AnyType", UserWarning),
)
pytestmark = [pytest.mark.filterwarnings(f"ignore:{text}:{kind.__name__}") for text, kind in NOISE]

CLASSES = ["cat", "dog", "größe"]
METADATA = {"classes": CLASSES, "image_size": 16, "crop_pct": 0.875, "model": "tiny"}


class Tiny(nn.Module):
    """uint8 images (N, 16, 16, 3) -> scores (N, 3), with a buffer, batch norm and dropout."""

    mean: torch.Tensor

    def __init__(self, seed: int = 0, classes: int = len(CLASSES)) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.conv = nn.Conv2d(3, 4, 3, stride=2)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, classes)
        self.register_buffer("mean", torch.tensor([0.4, 0.5, 0.6]))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = (images.permute(0, 3, 1, 2).float() / 255 - self.mean[:, None, None]) / 0.25
        x = self.norm(self.conv(x)).relu().mean((2, 3))
        scores: torch.Tensor = self.head(nn.functional.dropout(x, 0.5, self.training)).softmax(1)
        return scores


@pytest.fixture(scope="module")
def images() -> Any:
    return np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('registry') / 'with a space' / 'mlflow.db'}"


@pytest.fixture(scope="module")
def client(uri: str) -> Any:
    with warnings.catch_warnings():  # the marks of a module do not reach its fixtures
        warnings.filterwarnings("ignore", NOISE[0][0], NOISE[0][1])
        return tracking.open_store(uri, Path(uri.removeprefix("sqlite:///")).parent / "artifacts")


@pytest.fixture(scope="module")
def run_id(client: Any, uri: str) -> str:
    home = tracking.experiment(client, "tests", Path(uri.removeprefix("sqlite:///")).parent / "artifacts")
    return tracking.start_run(client, home, name="run-1", key="k", params={"seed": 0}, tags={})


def put(client: Any, run_id: str, images: Any, **changes: Any) -> Registered:
    values: dict[str, Any] = {
        "model_name": "pets",
        "classifier": Tiny(),
        "example": images,
        "metadata": METADATA,
        "tags": {"gsa.fingerprint": "f00d", "gsa.run": "run-1", "val_top1": "0.75", "n": "128"},
        "alias": "champion",
        "run_id": run_id,
        "metrics": {"val/top1": 0.75},
    }
    return register(client, **values | changes)


@pytest.fixture(scope="module")
def first(client: Any, run_id: str, images: Any) -> Registered:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", NOISE[1][0], NOISE[1][1])
        return put(client, run_id, images)


def scores(module: nn.Module, images: Any) -> Any:
    with torch.no_grad():
        return module.eval()(torch.from_numpy(images)).numpy()


def test_a_loaded_model_gives_the_scores_of_the_network(first: Registered, uri: str, images: Any) -> None:
    model = load("pets@champion", uri)
    assert (model.name, model.version) == ("pets", 1) == ("pets", first.version) and not first.reused
    assert model.classes == CLASSES and model.image_size == 16 and model.crop_pct == 0.875
    assert model.metadata["model"] == "tiny"
    for n in (1, 2, 3, 5, 0):
        got = model.predict(images[:n])
        assert got.shape == (n, 3) and got.dtype == np.float32
        np.testing.assert_allclose(got, scores(Tiny(), images[:n]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["pets@champion", "pets/1", "models:/pets@champion", "models:/pets/1"])
def test_a_model_has_several_names(name: str, first: Registered, uri: str) -> None:
    assert load(name, uri).version == 1


def test_a_version_tells_where_it_comes_from(first: Registered, client: Any, run_id: str, uri: str) -> None:
    version = client.get_model_version("pets", "1")
    assert version.run_id == run_id and version.tags == load("pets/1", uri).tags
    assert version.tags["gsa.fingerprint"] == "f00d" and version.tags["val_top1"] == "0.75"
    assert version.tags["gsa.weights"] == weights_digest(Tiny())
    run = client.get_run(run_id)
    outputs = [client.get_logged_model(output.model_id) for output in run.outputs.model_outputs]
    (logged,) = [model for model in outputs if model.artifact_location == version.source]
    assert logged.source_run_id == run_id and str(logged.status) == "READY"
    assert json.loads(logged.tags["mlflow.modelVersions"]) == [{"name": "pets", "version": 1}]
    assert [(m.key, m.value) for m in logged.metrics] == [("registered/val/top1", 0.75)]
    assert run.data.metrics["registered/val/top1"] == 0.75


def test_anyone_can_load_it_without_our_code(
    first: Registered, uri: str, images: Any, tmp_path: Path
) -> None:
    np.save(tmp_path / "images.npy", images)
    code = """if True:
        import sys
        sys.modules["pipeline"] = sys.modules["gsa_models"] = None  # an import of ours fails
        import mlflow, numpy as np, torch
        images = np.load("images.npy")
        np.save("pyfunc.npy", mlflow.pyfunc.load_model("models:/pets@champion").predict(images))
        with torch.no_grad():
            graph = mlflow.pytorch.load_model("models:/pets/1")
            np.save("pytorch.npy", graph(torch.from_numpy(images[:1])).numpy())
        info = mlflow.models.get_model_info("models:/pets@champion")
        print(info.metadata["classes"], info.signature.inputs, info.signature.outputs)
    """
    environment = os.environ | {"MLFLOW_TRACKING_URI": uri, "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert str(CLASSES) in done.stdout and "uint8" in done.stdout and "(-1, 16, 16, 3)" in done.stdout
    expected = scores(Tiny(), images)
    np.testing.assert_allclose(np.load(tmp_path / "pyfunc.npy"), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(np.load(tmp_path / "pytorch.npy"), expected[:1], rtol=1e-5, atol=1e-6)


def test_registering_the_same_again_reuses_the_version_and_moves_the_alias(
    first: Registered, client: Any, run_id: str, images: Any
) -> None:
    assert put(client, run_id, images, alias="again") == Registered(1, reused=True)
    assert client.get_registered_model("pets").aliases == {"champion": 1, "again": 1}
    other = put(client, run_id, images, model_name="twins")
    assert other == Registered(1, reused=False)  # another name is another model
    newer = put(client, run_id, images, model_name="twins", classifier=Tiny(seed=1), alias=None)
    assert newer == Registered(2, reused=False)
    tags = {"gsa.fingerprint": "beef"}
    assert put(client, run_id, images, model_name="twins", tags=tags) == Registered(3, reused=False)
    assert client.get_registered_model("twins").aliases == {"champion": 3}
    assert len(client.search_model_versions("name = 'twins'")) == 3


def test_weights_digests_see_every_byte_name_and_shape() -> None:
    digests = {weights_digest(Tiny()), weights_digest(Tiny(seed=1))}
    for name in Tiny().state_dict():
        module = Tiny()
        tensor = module.state_dict()[name]
        tensor.view(-1)[-1:].add_(1)
        digests.add(weights_digest(module))
    assert len(digests) == 2 + len(Tiny().state_dict())
    assert weights_digest(Tiny()) == weights_digest(Tiny().train())
    ones = [torch.ones(2, 3), torch.ones(3, 2), torch.ones(2, 3, dtype=torch.float64)[:, :0], torch.ones(0)]
    assert len({weights_digest(nn.ParameterList([tensor])) for tensor in ones}) == 4


def test_packaging_leaves_the_network_as_it_was(tmp_path: Path, images: Any) -> None:
    net = Tiny().train()
    before = weights_digest(net)
    registry.package(net, images, metadata=METADATA, folder=tmp_path / "model")
    assert net.training and weights_digest(net) == before


def test_a_package_holds_no_pickle_that_can_run_code(
    tmp_path: Path, images: Any, client: Any, run_id: str, uri: str
) -> None:
    folder = tmp_path / "model"
    registry.package(Tiny(), images, metadata=METADATA, folder=folder)
    assert {p.suffix for p in folder.rglob("*") if p.is_file()} == {".pt2", ".json", ".yaml", ".txt", ""}
    assert (folder / "requirements.txt").read_text().split() == [
        f"mlflow=={importlib.metadata.version('mlflow')}",
        f"torch=={torch.__version__.partition('+')[0]}",
        f"numpy=={np.__version__}",
    ]
    archive = folder / "data" / "model.pt2"
    registry._graph(folder)  # refuses what torch's weights_only unpickler refuses
    canary = tmp_path / "canary"
    poison(archive, canary)
    with pytest.raises(Exception, match="not a pickle-free payload"):
        registry._graph(folder)
    client.create_registered_model("poisoned")
    client.create_model_version("poisoned", folder.as_uri(), run_id)
    with pytest.raises(InputError, match="model poisoned: cannot be read from file://"):
        load("poisoned", uri)
    assert not canary.exists()


class Touch:
    """Unpickled, it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def poison(archive: Path, canary: Path) -> None:
    """Replace the sample inputs of an exported graph, which torch unpickles, by something that runs."""
    evil = io.BytesIO()
    torch.save(Touch(canary), evil)
    with zipfile.ZipFile(archive) as source:
        members = {info: source.read(info) for info in source.infolist()}
    with zipfile.ZipFile(archive, "w") as target:
        for info, data in members.items():
            target.writestr(info, evil.getvalue() if "sample_inputs" in info.filename else data)
    noise = logging.getLogger("torch._export.serde.serialize")  # torch 2.13: its warning cannot be formatted
    noise.disabled = True
    with contextlib.suppress(AssertionError):
        torch.export.load(archive)  # the poison works where nobody looks
    noise.disabled = False
    assert canary.exists()
    canary.unlink()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pest@champion", r"model pest is not registered; did you mean pets\? \(there are: .*pets"),
        ("pets@best", r"model pets has no alias best \(versions: 1; aliases: .*champion = 1"),
        ("pets/7", r"model pets has no version 7 \(versions: 1; aliases: .*champion = 1"),
        ("no spaces", r"model 'no spaces': expected NAME, NAME@alias or NAME/version"),
        ("pets@../../etc", "expected NAME, NAME@alias or NAME/version"),
        ("empty", r"model empty has no version  \(versions: none; aliases: none\)"),
        (
            "foreign/1",
            r"model foreign/1: not registered by gsa: classes, image_size, crop_pct not in its metadata",
        ),
        ("lost", r"model lost: cannot be read from .*nowhere"),
    ],
)
def test_what_is_not_there_is_one_clear_error(
    name: str, message: str, first: Registered, client: Any, uri: str, run_id: str, tmp_path: Path
) -> None:
    from mlflow.models import Model

    stem = name.partition("/")[0]
    if stem in ("empty", "foreign", "lost"):
        client.create_registered_model(stem)
    if stem == "foreign":
        Model().save(str(tmp_path / "MLmodel"))
        client.create_model_version(stem, tmp_path.as_uri(), run_id)
    if stem == "lost":
        client.create_model_version(stem, (tmp_path / "nowhere").as_uri(), run_id)
    with pytest.raises(InputError, match=message) as error:
        load(name, uri)
    assert "\n" not in str(error.value)


def test_a_version_is_there_while_it_has_its_alias(client: Any, run_id: str, images: Any, uri: str) -> None:
    put(client, run_id, images, model_name="moved", alias="best")
    assert registry.has_version(uri, "moved", "1", "best")
    assert not registry.has_version(uri, "moved", "2", "best")
    assert not registry.has_version(uri, "moved", "1", "other")
    assert not registry.has_version(uri, "nobody", "1", "best")
    client.delete_model_version("moved", "1")
    assert not registry.has_version(uri, "moved", "1", "best")


def test_a_model_whose_run_is_elsewhere_is_refused(client: Any, images: Any) -> None:
    with pytest.raises(InputError, match="model pets: its training run is not in this store: Run with"):
        put(client, "f" * 32, images)


def test_asking_makes_no_registry(tmp_path: Path) -> None:
    assert not registry.has_version(f"sqlite:///{tmp_path}/none/mlflow.db", "pets", "1", "champion")
    with pytest.raises(InputError, match=r"model pets: there is no registry at .*none/mlflow\.db"):
        load("pets", f"sqlite:///{tmp_path}/none/mlflow.db")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("alias", ["latest", "v1", "two words", "", "a/b"])
def test_an_impossible_alias_is_refused_before_anything_is_written(
    alias: str, client: Any, run_id: str, images: Any
) -> None:
    with pytest.raises(InputError, match="alias"):
        put(client, run_id, images, model_name="never", alias=alias)
    with pytest.raises(InputError, match="model name"):
        put(client, run_id, images, model_name="a'b")
    assert not client.search_model_versions("name = 'never'")


def test_what_cannot_be_packaged_is_refused(tmp_path: Path, images: Any, client: Any, run_id: str) -> None:
    folder = tmp_path / "model"
    for example in (images[:1], images.astype(np.float32), images[:, :8]):
        with pytest.raises(ValueError, match=r"example: expected uint8 \(2 or more, 16, 16, 3\), got"):
            registry.package(Tiny(), example, metadata=METADATA, folder=folder)
    with pytest.raises(ValueError, match=r"classifier: expected float32 \(5, 3\), got float32 \(5, 4\)"):
        registry.package(Tiny(classes=4), images, metadata=METADATA, folder=folder)
    with pytest.raises(ValueError, match="scores differ"):
        put(client, run_id, images, classifier=Fickle(), model_name="fickle")
    assert "fickle" not in [model.name for model in client.search_registered_models()]


class Fickle(Tiny):
    """A network whose graph, once exported, is another function than the network."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        scores = super().forward(images)
        return scores * 2 if torch.compiler.is_exporting() else scores


def test_wrong_pictures_are_refused(first: Registered, uri: str, images: Any) -> None:
    model = load("pets", uri)
    for wrong in (images.astype(np.float32), images[0], images[:, :8], images.transpose(0, 3, 1, 2)):
        with pytest.raises(ValueError, match=r"images: expected uint8 \([0-9]+, 16, 16, 3\), got"):
            model.predict(wrong)


def test_importing_the_registry_imports_nothing_heavy(tmp_path: Path) -> None:
    code = (
        "import sys, pipeline.registry; print([m for m in ('mlflow', 'torch', 'pandas') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_registering_is_silent_and_writes_nothing_where_it_stands(
    client: Any, run_id: str, uri: str, tmp_path: Path
) -> None:
    code = """if True:
        import sys
        from pathlib import Path
        import numpy as np, torch
        from pipeline import registry, tracking
        class Net(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.head = torch.nn.Linear(3, 2)
            def forward(self, images):
                return self.head(images.float().mean((1, 2)))
        uri, run_id = sys.argv[1:]
        done = registry.register(tracking.open_store(uri, Path()), model_name="silent", classifier=Net(),
            alias="a", run_id=run_id, example=np.zeros((2, 8, 8, 3), np.uint8), metrics={"x": 1.0},
            metadata={"classes": ["a", "b"], "image_size": 8, "crop_pct": 1.0}, tags={"gsa.fingerprint": "f"})
        print(done.version, registry.load("silent@a", uri).version)
    """
    done = subprocess.run(
        [sys.executable, "-c", code, uri, run_id], cwd=tmp_path, capture_output=True, text=True, timeout=200
    )
    assert (done.stdout, done.stderr, done.returncode) == ("1 1\n", "", 0)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow  # starts a server
def test_a_model_is_registered_and_loaded_through_a_server(
    client: Any, run_id: str, uri: str, images: Any, tmp_path: Path
) -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    artifacts = Path(uri.removeprefix("sqlite:///")).parent / "artifacts"
    command, environment = serve(uri, artifacts, port=port)
    with open(tmp_path / "log", "w") as log:
        server = psutil.Popen(command, env=environment, cwd=tmp_path, stdout=log, stderr=log)
    try:
        address = f"http://127.0.0.1:{port}"
        end = time.monotonic() + 120
        while True:
            assert server.poll() is None and time.monotonic() < end, (tmp_path / "log").read_text()
            try:
                remote = tracking.open_store(address, tmp_path)
                break
            except InputError:
                time.sleep(0.5)
        away = tracking.experiment(remote, "away", tmp_path)
        other = tracking.start_run(remote, away, name="r", key="r", params={}, tags={})
        for target, name in ((run_id, "near"), (other, "far")):  # files on a shared disk; files by the server
            assert put(remote, target, images, model_name=name) == Registered(1, reused=False)
            model = load(f"{name}@champion", address)
            np.testing.assert_allclose(model.predict(images), scores(Tiny(), images), rtol=1e-5, atol=1e-6)
    finally:
        family = [server, *server.children(recursive=True)]
        server.terminate()
        _, left = psutil.wait_procs(family, timeout=20)
        for process in left:
            process.kill()
    assert not left
