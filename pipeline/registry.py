"""Package a trained network, register it in MLflow, give it an alias; load it and predict."""

import contextlib
import copy
import hashlib
import importlib.metadata
import json
import os
import re
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.config import InputError, suggest
from pipeline.facts import code_state
from pipeline.tracking import database_path, open_store

if TYPE_CHECKING:
    import torch
    from mlflow import MlflowClient

Images = NDArray[np.uint8]  # (N, H, W, 3), RGB
Scores = NDArray[np.float32]  # (N, classes)

SCHEME = "models:/"  # of a registered model's URI, to tell it from a run
METADATA = ("classes", "image_size", "crop_pct")  # what `load` needs beside the graph
_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
_ALIAS = r"(?!latest$|v[0-9]+$)[a-z0-9_-]{1,64}"  # MLflow keeps `latest` and `v1` for itself


class Registered(NamedTuple):
    """A version in the registry; `reused` where the same weights had been registered before."""

    version: int
    reused: bool


@dataclass(frozen=True)
class Loaded:
    """A registered model, ready to predict."""

    name: str
    version: int
    tags: dict[str, str]
    metadata: dict[str, Any]
    graph: "Callable[[torch.Tensor], torch.Tensor]"

    @property
    def classes(self) -> list[str]:
        return list(self.metadata["classes"])

    @property
    def image_size(self) -> int:
        return int(self.metadata["image_size"])

    @property
    def crop_pct(self) -> float:
        return float(self.metadata["crop_pct"])

    def predict(self, images: Images) -> Scores:
        """Scores of uint8 RGB images of the model's size, (N, H, W, 3) -> (N, classes), on the CPU."""
        import torch

        shape = (len(images), self.image_size, self.image_size, 3)
        if images.dtype != np.uint8 or images.shape != shape:
            raise ValueError(f"images: expected uint8 {shape}, got {images.dtype} {images.shape}")
        with torch.inference_mode():
            return _numpy(self.graph(torch.from_numpy(np.ascontiguousarray(images))))


def package(
    classifier: "torch.nn.Module", example: Images, *, metadata: Mapping[str, Any], folder: Path
) -> None:
    """Write a classifier as an MLflow model: an exported graph without pickle, for batches of any size.

    classifier: uint8 images (N, H, W, 3) -> float32 scores (N, classes), normalisation inside.
    example: two images or more, since the exporter fixes a batch of one. metadata: classes, image_size,
    crop_pct and what else a user of the model should know; plain values.
    Raises ValueError where the graph does not give the classifier's scores.
    """
    import mlflow.pytorch
    import torch
    from mlflow.models import Model, ModelSignature
    from mlflow.types import Schema, TensorSpec

    missing = [name for name in METADATA if name not in metadata]
    assert not missing, f"metadata lacks {missing}"
    size, classes = int(metadata["image_size"]), len(metadata["classes"])
    if example.dtype != np.uint8 or len(example) < 2 or example.shape[1:] != (size, size, 3):
        raise ValueError(
            f"example: expected uint8 (2 or more, {size}, {size}, 3), got {example.dtype} {example.shape}"
        )
    module = copy.deepcopy(classifier).cpu().eval()  # a graph stays on the device that it was made on
    with torch.no_grad():
        expected = _numpy(module(torch.from_numpy(example)))
    if expected.shape != (len(example), classes) or expected.dtype != np.float32:
        raise ValueError(
            f"classifier: expected float32 {(len(example), classes)}, got {expected.dtype} {expected.shape}"
        )
    mlflow.pytorch.save_model(
        module,
        str(folder),
        mlflow_model=Model(metadata=dict(metadata)),
        signature=ModelSignature(  # without names: pyfunc would wrap a named tensor in a dict
            inputs=Schema([TensorSpec(np.dtype("uint8"), (-1, size, size, 3))]),
            outputs=Schema([TensorSpec(np.dtype("float32"), (-1, classes))]),
        ),
        input_example=example[:2],
        metadata=dict(metadata),
        pip_requirements=[f"{name}=={_release(name)}" for name in ("torch", "numpy")],
        serialization_format="pt2",
    )
    graph = _graph(folder)
    for n in (1, len(example)):
        with torch.no_grad():
            scores = _numpy(graph(torch.from_numpy(example[:n])))
        if not np.allclose(scores, expected[:n], rtol=1e-3, atol=1e-4):
            worst = float(np.abs(scores - expected[:n]).max())
            raise ValueError(
                f"the packaged model's scores differ from the classifier's by {worst:.2g} (batch {n})"
            )


def register(
    client: "MlflowClient",
    *,
    model_name: str,
    classifier: "torch.nn.Module",
    example: Images,
    metadata: Mapping[str, Any],
    tags: Mapping[str, str],
    alias: str | None,
    run_id: str,
    metrics: Mapping[str, float],
) -> Registered:
    """A new version of a registered model, tied to its training run; the alias is moved last.

    `tags` hold the lineage, with `gsa.fingerprint`; the digest of the weights and the commit of the code are
    added. The same fingerprint and weights under the same name give the version that exists. `metrics` are
    shown with the model, as registered/NAME. For the rest see `package`.
    """
    from mlflow.exceptions import MlflowException

    if not re.fullmatch(_NAME, model_name):
        raise InputError(f"model name {model_name!r}: expected letters, digits, '.', '_' and '-', at most 64")
    if alias is not None and not re.fullmatch(_ALIAS, alias):
        raise InputError(
            f"alias {alias!r}: expected a-z, 0-9, '_' and '-'; `latest` and `v1` are MLflow's own"
        )
    try:
        experiment_id = client.get_run(run_id).info.experiment_id
    except MlflowException as error:
        raise InputError(f"model {model_name}: its training run is not in this store: {error}") from None
    tags = {**tags, "gsa.weights": weights_digest(classifier)}
    if code := code_state():
        tags["gsa.git_commit"] = code[0]
    same = " and ".join(f"tags.`{tag}` = '{tags[tag]}'" for tag in ("gsa.fingerprint", "gsa.weights"))
    found = client.search_model_versions(f"name = '{model_name}' and {same}")
    if found:
        version = max(int(each.version) for each in found)
    else:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "model"
            package(classifier, example, metadata=metadata, folder=folder)
            model_id, source = _log_model(client, folder, experiment_id, run_id, tags)
        with contextlib.suppress(MlflowException):  # it exists; if it does not, the next line says so
            client.create_registered_model(model_name)
        created = client.create_model_version(model_name, source, run_id, tags=dict(tags), model_id=model_id)
        version = int(created.version)
        link = json.dumps([{"name": model_name, "version": version}])
        client.set_logged_model_tags(model_id, {"mlflow.modelVersions": link})
        _log_metrics(client, run_id, model_id, version, metrics)
    if alias is not None:
        client.set_registered_model_alias(model_name, alias, str(version))
    return Registered(version, reused=bool(found))


def load(uri: str, tracking_uri: str) -> Loaded:
    """A model by `NAME@alias`, `NAME/version` or `NAME` (its newest version).

    Raises InputError: no registry there, no such model, alias or version, or a model that is not ours.
    """
    match = re.fullmatch(rf"(?:{SCHEME})?({_NAME})(?:@([\w-]+)|/([0-9]+))?", uri)
    if not match:
        raise InputError(f"model {uri!r}: expected NAME, NAME@alias or NAME/version")
    database = database_path(tracking_uri)
    if database and not database.exists():  # asking must not make one
        raise InputError(f"model {uri}: there is no registry at {database}; register a model first")
    client = open_store(tracking_uri, Path())
    found = _find(client, *match.groups())
    metadata, graph = _fetch(client, found, uri)
    return Loaded(found.name, int(found.version), dict(found.tags), metadata, graph)


def has_version(uri: str, name: str, version: str, alias: str) -> bool:
    """Whether a registry has this version of a model under this alias."""
    from mlflow.exceptions import MlflowException

    database = database_path(uri)
    if database and not database.exists():
        return False
    try:
        found = open_store(uri, Path()).get_model_version_by_alias(name, alias)
    except MlflowException:
        return False
    return str(found.version) == version


def weights_digest(module: "torch.nn.Module") -> str:
    """sha256 of a module's parameters and buffers: names, types, shapes, bytes."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _log_model(
    client: "MlflowClient", folder: Path, experiment_id: str, run_id: str, tags: Mapping[str, str]
) -> tuple[str, str]:
    """A packaged model -> MLflow's LoggedModel, an output of the run. Returns its id and where it lies."""
    from mlflow.entities import LoggedModelOutput
    from mlflow.models import Model

    # Step by step through the client: `mlflow.pytorch.log_model` does the same to the process's global store.
    logged = client.create_logged_model(
        experiment_id, name="classifier", source_run_id=run_id, tags=dict(tags), model_type="classifier"
    )
    model = Model.load(str(folder))
    model.model_id = model.model_uuid = logged.model_id
    model.run_id, model.artifact_path = run_id, logged.artifact_location
    model.save(str(folder / "MLmodel"))
    client.log_model_artifacts(logged.model_id, str(folder))
    client.finalize_logged_model(logged.model_id, "READY")
    client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=0)])
    return logged.model_id, logged.artifact_location


def _log_metrics(
    client: "MlflowClient", run_id: str, model_id: str, version: int, metrics: Mapping[str, float]
) -> None:
    from mlflow.entities import Metric

    now = int(time.time() * 1000)
    points = [Metric(f"registered/{k}", v, now, version, model_id=model_id) for k, v in metrics.items()]
    client.log_batch(run_id, metrics=points)


def _find(client: "MlflowClient", name: str, alias: str | None, version: str | None) -> Any:
    models = {model.name: model for model in client.search_registered_models(max_results=1000)}
    if name not in models:
        there = ", ".join(sorted(models)) or "none"
        raise InputError(f"model {name} is not registered{suggest(name, models)} (there are: {there})")
    aliases = {key: int(value) for key, value in models[name].aliases.items()}
    versions = {int(each.version): each for each in client.search_model_versions(f"name = '{name}'")}
    number = aliases.get(alias) if alias else int(version) if version else max(versions, default=None)
    if number not in versions:
        wanted = f"alias {alias}" if alias else f"version {version or ''}"
        known = ", ".join(f"{key} = {value}" for key, value in sorted(aliases.items())) or "none"
        there = ", ".join(map(str, sorted(versions))) or "none"
        raise InputError(f"model {name} has no {wanted} (versions: {there}; aliases: {known})")
    return versions[number]


def _fetch(client: "MlflowClient", found: Any, uri: str) -> tuple[dict[str, Any], Any]:
    """Metadata and graph of a version."""
    from mlflow.artifacts import download_artifacts
    from mlflow.exceptions import MlflowException
    from mlflow.models import Model

    source = client.get_model_version_download_uri(found.name, str(found.version))
    here = source.startswith(("file:", "/"))  # read where they lie
    with tempfile.TemporaryDirectory() as scratch:
        try:
            path = download_artifacts(
                source, dst_path=None if here else scratch, tracking_uri=client.tracking_uri
            )
            # Not mlflow.models.get_model_info: it asks the process's global store about the model.
            metadata = Model.load(path).metadata or {}
            missing = [name for name in METADATA if name not in metadata]
            if missing:
                raise InputError(
                    f"model {uri}: not registered by gsa: {', '.join(missing)} not in its metadata"
                )
            return metadata, _graph(Path(path))
        except (MlflowException, OSError) as error:
            detail = " ".join(str(error).split())
            raise InputError(f"model {uri}: cannot be read from {source}: {detail}") from None


def _graph(folder: Path) -> "Callable[[torch.Tensor], torch.Tensor]":
    import mlflow.pytorch

    os.environ["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] = "false"  # a registry must not run foreign code here
    graph: Callable[[torch.Tensor], torch.Tensor] = mlflow.pytorch.load_model(str(folder))
    return graph


def _numpy(scores: "torch.Tensor") -> Scores:
    array: Scores = scores.detach().numpy()
    return array


def _release(package: str) -> str:
    return importlib.metadata.version(package).partition("+")[0]
