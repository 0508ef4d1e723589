"""Config + shards -> network and run folder, all checked before any GPU is asked for."""

import io
import logging
import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from gsa_models import create_model, model_cost, parse_components, parse_placement
from gsa_models.cost import Cost
from gsa_models.resnet import ResNet
from gsa_models.resolution import resize_positions
from gsa_models.zoo import ARCHITECTURES
from pipeline import checkpoint, order
from pipeline.config import (
    Config,
    ConfigError,
    DataConfig,
    InputError,
    OptimConfig,
    dump,
    fingerprint,
    read_yaml,
    validate,
)
from pipeline.foreign import local_tars
from pipeline.manifest import Manifest, read_manifest
from pipeline.remote import RemoteError, bound, is_url
from pipeline.rundir import Out, RunDir, read_json, write_atomic, write_json

log = logging.getLogger("gsa")


class Plan(NamedTuple):
    """A run that could be made: its folder, and what would be in it. config is in its canonical spelling."""

    run: RunDir
    config: Config
    manifest: Manifest
    cost: Cost
    fingerprint: str
    out: Out


def prepare(out: Out, config: Config) -> RunDir:
    """The folder of the run that a config stands for, made if need be: the same config, the same run.

    Raises InputError: no such shards, settings that make no network, a batch above the train split.
    """
    return make(plan(out, config))


def make(planned: Plan) -> RunDir:
    """The folder of a planned run, with its settings and facts in it."""
    run, config, manifest, cost, key, out = planned
    place = str(manifest.folder.absolute())
    if not run.facts.exists() or read_json(run.facts)["shards"] != place:  # a new run, or moved shards
        run.logs.mkdir(parents=True, exist_ok=True)
        if config.init:
            buffer = io.BytesIO()
            torch.save(_initial(out, config, manifest.classes).state_dict(), buffer)
            write_atomic(run.init, buffer.getvalue())
        write_atomic(run.config, dump(config))
        facts = {
            "fingerprint": key,
            "shards": place,
            "shards_digest": manifest.digest,
            "classes": list(manifest.classes),
            "params": cost.params,
            "gflops": cost.flops / 1e9,
        }
        write_json(run.facts, facts)
    return run


def plan(out: Out, config: Config) -> Plan:
    """What a config stands for, checked to the end on the meta device; nothing is written.

    Raises InputError: no such shards, settings that make no network, a batch above the train split.
    """
    manifest = read_manifest(out.shards(config.data.shards))
    cost = _checked_cost(_model_part(config), len(manifest.classes))
    config = _canonical(config)
    try:
        order.steps_per_epoch(train_samples(config, manifest), config.optim.global_batch)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if config.data.stream:
        local_tars(config.data.stream)
    if not len(manifest.split("val")):
        raise ConfigError(f"{manifest.folder}: no val samples to evaluate on; next: make a set with some")
    first = _weights_digest(_initial(out, config, manifest.classes)) if config.init else None
    key = fingerprint(config, manifest.digest, first)
    run = out.run(f"{config.model.name}-{key[:10]}")
    return Plan(run, config, manifest, cost, key, out)


def _model_part(config: Config) -> Config:
    """What the network and its cost depend on; all else as by default. Many points of a sweep share it."""
    sizes = ("image_size", "test_size", "start_size")
    return Config(
        model=config.model,
        data=DataConfig(**{name: getattr(config.data, name) for name in sizes}),
        optim=OptimConfig(micro_batch=config.optim.micro_batch, global_batch=config.optim.micro_batch),
    )


@lru_cache(maxsize=1024)
def _checked_cost(config: Config, classes: int) -> Cost:
    """Of a network that can be built, and trained in micro-batches of that size. ConfigError if not."""
    network = build_model(config, classes, device="meta")
    for size in {config.data.image_size, size_at(config, 0), config.data.eval_size}:
        _check_micro_batch(at_size(config, size), classes)
    return model_cost(network, config.data.image_size)


def train_samples(config: Config, manifest: Manifest) -> int:
    """Samples of an epoch."""
    return config.data.stream_samples or len(manifest.split("train"))


def read_run(run: RunDir) -> tuple[Config, Manifest]:
    """The settings of a run and the shards that it was made for; InputError if those have changed."""
    config = validate(Config, read_yaml(run.config), where=str(run.config))
    facts = read_json(run.facts)
    manifest = read_manifest(Path(facts["shards"]))
    if manifest.digest != facts["shards_digest"]:
        raise InputError(
            f"run {run.name}: the shards in {manifest.folder} are not those that the run was made for "
            f"(expected digest {facts['shards_digest']}, got {manifest.digest}); start a new run"
        )
    return config, manifest


def build_model(config: Config, classes: int, device: str = "cpu") -> ResNet:
    """The network of a config with seeded weights; the global generator is left as it was.

    Raises ConfigError for settings that make no network.
    """
    model = config.model
    try:
        with torch.random.fork_rng(devices=[]), torch.device(device):
            torch.manual_seed(config.seed)
            return create_model(
                model.name,
                num_classes=classes,
                image_size=config.data.image_size,
                stem=model.stem,
                placement=model.placement,
                components=model.components,
                window=model.window,
                heads=model.heads,
                query_softmax=model.query_softmax,
                drop_path=model.drop_path,
            )
    except ValueError as error:
        raise ConfigError(f"model: {error}") from None


def check_cache(config: Config, manifest: Manifest) -> None:
    """Warn where the cache is too small for two blocks of remote shards: one is read, the next is fetched.

    Raises InputError: $GSA_CACHE_GB is no number.
    """
    samples = manifest.split("train")
    sizes = [shard.bytes for shard in samples.shards if is_url(shard.path)]
    if not sizes or config.data.stream:
        return
    blocks = max(1, len(samples) // config.data.shuffle_block)
    needed = min(
        sum(sizes), 2 * sum(sizes) // blocks + max(sizes)
    )  # a block is about so large, in whole shards
    try:
        most = bound()
    except RemoteError as error:
        raise InputError(str(error)) from None
    if needed > most:
        log.warning(
            "small_cache GSA_CACHE_GB=%g: shards are fetched again and again; next: GSA_CACHE_GB=%g, which "
            "holds two blocks, or fewer samples in a block (data.shuffle_block=%d)",
            most / 1e9,
            math.ceil(needed / 1e8) / 10,
            config.data.shuffle_block,
        )


def load_trained(run: RunDir) -> tuple[ResNet, Config, Manifest]:
    """The network of a run with its newest weights, in eval mode. InputError if it has none."""
    config, manifest = read_run(run)
    saved = checkpoint.newest(run.checkpoints)
    if saved is None:
        raise InputError(f"run {run.name} has no checkpoint; next: train it for an epoch at least")
    model = build_model(at_size(config, config.data.eval_size), len(manifest.classes))
    try:
        model.load_state_dict(resize_positions(saved.get("ema") or saved["model"], model))
    except ValueError as error:
        raise InputError(f"run {run.name}: its checkpoint is of other code: {error}") from None
    return model.eval(), config, manifest


def at_size(config: Config, size: int) -> Config:
    """The same for train pictures of another size."""
    return config.model_copy(update={"data": config.data.model_copy(update={"image_size": size})})


def size_at(config: Config, epoch: int) -> int:
    """Pixels a side of the train pictures of an epoch.

    With data.start_size they grow from that on a line, in steps of 32, to data.image_size, which the last
    quarter of the epochs has (progressive resizing).
    """
    data, grown = config.data, 0.75 * config.optim.epochs
    if data.start_size is None or epoch >= grown:
        return data.image_size
    size = data.start_size + (data.image_size - data.start_size) * epoch / grown
    return min(data.image_size, data.start_size + round((size - data.start_size) / 32) * 32)


def first_weights(run: RunDir) -> dict[str, Tensor] | None:
    """The weights that a run begins with, if its config names some."""
    if not run.init.exists():
        return None
    weights: dict[str, Tensor] = torch.load(run.init, map_location="cpu", weights_only=True)
    return weights


def _initial(out: Out, config: Config, classes: Sequence[str]) -> ResNet:
    """The network of the config with the weights of the run or registered model that `config.init` names."""
    from pipeline import registry  # not before: runs without MLflow need it not

    source = str(config.init)
    if source.startswith(registry.SCHEME):
        loaded = registry.load(source, out.tracking_uri)
        graph = loaded.graph.state_dict()  # type: ignore[attr-defined]
        weights, theirs = {k.removeprefix("network."): v for k, v in graph.items()}, loaded.classes
    else:
        trained, _, manifest = load_trained(out.find_run(source))
        weights, theirs = trained.state_dict(), list(manifest.classes)
    network = build_model(config, len(classes))
    fresh = {k: v for k, v in network.state_dict().items() if k.startswith("head.")}
    try:
        network.load_state_dict(
            resize_positions(weights | (fresh if theirs != list(classes) else {}), network)
        )
    except ValueError as error:
        raise ConfigError(f"init {source}: {error}") from None
    return network


def _weights_digest(network: ResNet) -> str:
    from pipeline.registry import weights_digest

    return weights_digest(network)


def _check_micro_batch(config: Config, classes: int) -> None:
    """Refuse a micro-batch of one sample where a map of one pixel leaves batch norm no spread to measure."""
    side, network = config.data.image_size, build_model(config, classes, device="meta")
    try:
        network(torch.empty(config.optim.micro_batch, 3, side, side, device="meta"))
    except ValueError as error:
        raise ConfigError(f"optim.micro_batch {config.optim.micro_batch} is too small: {error}") from None


def _canonical(config: Config) -> Config:
    """Placement and components in their one canonical spelling: equal networks, equal fingerprints."""
    architecture = ARCHITECTURES[config.model.name]
    placement = parse_placement(config.model.placement or architecture.placement, architecture.blocks)
    model = config.model.model_copy(
        update={"placement": placement, "components": parse_components(config.model.components)}
    )
    return config.model_copy(update={"model": model})
