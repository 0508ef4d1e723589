"""Config + shards -> network and run folder, all checked before any GPU is asked for."""

from pathlib import Path

import torch
from torch import nn

from gsa_models import create_model, model_cost, parse_components, parse_placement
from gsa_models.resnet import ResNet
from gsa_models.zoo import ARCHITECTURES
from pipeline import checkpoint, order
from pipeline.config import (
    Config,
    ConfigError,
    InputError,
    dump,
    fingerprint,
    read_yaml,
    validate,
)
from pipeline.foreign import local_tars
from pipeline.manifest import Manifest, read_manifest
from pipeline.rundir import Out, RunDir, read_json, write_atomic, write_json


def prepare(out: Out, config: Config) -> RunDir:
    """The folder of the run that a config stands for, made if need be: the same config, the same run.

    Raises InputError: no such shards, settings that make no network, a batch above the train split.
    """
    manifest = read_manifest(out.shards(config.data.shards))
    network = build_model(config, len(manifest.classes), device="meta")
    config = _canonical(config)
    try:
        order.steps_per_epoch(train_samples(config, manifest), config.optim.global_batch)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if config.data.stream:
        local_tars(config.data.stream)
    if not len(manifest.split("val")):
        raise ConfigError(f"{manifest.folder}: no val samples to evaluate on; next: make a set with some")
    key = fingerprint(config, manifest.digest)
    run = out.run(f"{config.model.name}-{key[:10]}")
    place = str(manifest.folder.absolute())
    if not run.facts.exists() or read_json(run.facts)["shards"] != place:  # a new run, or moved shards
        _check_micro_batch(network, config)
        cost = model_cost(network, config.data.image_size)
        run.logs.mkdir(parents=True, exist_ok=True)
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


def load_trained(run: RunDir) -> tuple[ResNet, Config, Manifest]:
    """The network of a run with its newest weights, in eval mode. InputError if it has none."""
    config, manifest = read_run(run)
    saved = checkpoint.newest(run.checkpoints)
    if saved is None:
        raise InputError(f"run {run.name} has no checkpoint; next: train it for an epoch at least")
    model = build_model(config, len(manifest.classes))
    try:
        model.load_state_dict(saved["model"])
    except ValueError as error:
        raise InputError(f"run {run.name}: its checkpoint is of other code: {error}") from None
    return model.eval(), config, manifest


def _check_micro_batch(network: nn.Module, config: Config) -> None:
    """Refuse a micro-batch of one sample where a map of one pixel leaves batch norm no spread to measure."""
    side = config.data.image_size
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
