"""Recipe YAML + overrides -> frozen, validated config; fingerprint; "did you mean"."""

import difflib
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

RECIPE_KINDS = ("train", "sweep", "workflow")
MAX_YAML_BYTES = 1_000_000
HANG_S = 600  # of a rank that others wait for


class InputError(ValueError):
    """What a user can cause and mend: the command line prints it as one line and exits with 2."""


class ConfigError(InputError):
    """A recipe, an override or an option that cannot be what was meant."""


class Preempted(Exception):
    """Asked to stop, a run has saved a checkpoint and ended: the same command goes on. Exit code 75."""


class TrainingFailed(Exception):
    """Restarts did not help: its text says who died how often, where the log is, and what to do."""


class Section(BaseModel):
    """Frozen, strict, no unknown fields: every settings class derives from it."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(gt=0)]
# A folder or registry name: it may reach a path, a URI and a shell.
NAME, SPAN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$", r"^[1-9][0-9]*(\.\.[1-9][0-9]*)?$"
PATTERNS = {  # in words, and the next move
    NAME: ("1 to 64 letters, digits, '.', '_' or '-', a letter or digit first", "choose such a name"),
    SPAN: ("N or MIN..MAX, from 1 on", "2 or 1..4"),
}
Name = Annotated[str, Field(pattern=NAME)]


class ModelConfig(Section):
    """The network, in the words of `gsa_models.create_model`; the class count comes from the shards."""

    name: str = "gsa_resnet50"
    stem: Literal["imagenet", "small"] = "imagenet"
    placement: str | None = None
    components: str = "content+column+row"
    window: Positive | None = None
    heads: Positive = 8
    query_softmax: bool = False
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.0  # of the last block; from 0 at the first, on a line


class DataConfig(Section):
    """The samples and what is done to each picture."""

    shards: str = "imagenet"  # a name below OUT/shards, or a path
    image_size: Positive = 224  # pixels a side
    test_size: Positive | None = None  # at test, where it is another: position tables are resampled for it
    start_size: Positive | None = None  # of the first epochs, where smaller: grows on a line to image_size
    crop_scale: Annotated[tuple[Fraction, Fraction], Field(strict=False)] = (0.08, 1.0)  # share of the area
    flip: Fraction = 0.5  # probability of a horizontal flip
    crop_pct: Annotated[float, Field(gt=0, le=1)] = 0.875  # at test: image_size / resized shorter side
    shuffle_block: Positive = 32_768  # samples shuffled together, in whole shards: fewer are read at a time
    repeats: Positive = 1  # views of a picture in a global batch, of fewer pictures (arXiv 1901.09335)
    max_bad: Fraction = 0.001  # share of the train samples that may turn out unreadable in an epoch
    # Train samples from tars without a manifest instead, read by webdataset: see pipeline/stream.py for what
    # that costs. `shards` then gives the classes and the val samples.
    stream: Annotated[str, Field(min_length=1)] | None = None  # a folder, or train-{000000..001023}.tar
    stream_samples: Positive | None = None  # that make an epoch

    @property
    def eval_size(self) -> int:
        """Pixels a side of what is evaluated, exported and predicted."""
        return self.test_size or self.image_size

    @model_validator(mode="after")
    def _growing(self) -> "DataConfig":
        if self.start_size and self.start_size > self.image_size:
            raise ValueError(f"start_size {self.start_size}: expected at most image_size {self.image_size}")
        return self

    @model_validator(mode="after")
    def _some_area(self) -> "DataConfig":
        low, high = self.crop_scale
        if not 0 < low <= high:
            raise ValueError(
                f"crop_scale [{low}, {high}]: expected smallest and largest share of the area, above 0"
            )
        return self

    @model_validator(mode="after")
    def _samples_of_a_stream(self) -> "DataConfig":
        if (self.stream is None) != (self.stream_samples is None):
            raise ValueError("stream and stream_samples: expected both or none")
        if self.stream and self.repeats > 1:
            raise ValueError(f"repeats {self.repeats}: a stream gives each picture once; expected 1")
        return self


class AugmentConfig(Section):
    """What is done to a batch on the device, beside crop and flip; all of it off."""

    policy: Literal["none", "randaugment", "trivialaugment"] = "none"
    ops: Annotated[int, Field(ge=1, le=8)] = 2  # of RandAugment, for each picture
    magnitude: Annotated[int, Field(ge=0, le=30)] = 9  # of RandAugment, of 30
    color_jitter: Annotated[float, Field(ge=0, lt=1)] = (
        0.0  # brightness, contrast, saturation times 1 +- this
    )
    erase: Fraction = 0.0  # probability that a random rectangle is erased (arXiv 1708.04896)
    mixup: Annotated[float, Field(ge=0)] = 0.0  # alpha of arXiv 1710.09412
    cutmix: Annotated[float, Field(ge=0)] = 0.0  # alpha of arXiv 1905.04899; with mixup: one of them, evenly


class OptimConfig(Section):
    """The loss, the optimizer, its schedule, and the batch."""

    name: Literal["sgd", "adamw", "lamb"] = "sgd"
    lr: Annotated[float, Field(gt=0)] = 0.1  # for 256 samples, if lr_rule is linear
    lr_rule: Literal["linear", "none"] = "linear"  # the peak: lr * global_batch / 256, or lr as it is
    schedule: Literal["cosine", "step", "onecycle"] = "cosine"  # after the warm-up; onecycle has its own
    step_epochs: Annotated[float, Field(gt=0)] = 30.0  # of schedule step: a tenth of lr each time
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9  # of AdamW and LAMB the first beta
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4  # not of norms, biases and position tables
    epochs: Positive = 90
    warmup_epochs: Annotated[float, Field(ge=0)] = 5.0
    loss: Literal["cross_entropy", "bce"] = "cross_entropy"  # bce: each class by itself (arXiv 2110.00476)
    label_smoothing: Fraction = 0.1
    clip_norm: Annotated[float, Field(gt=0)] | None = None  # of the gradient of a step
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.0  # decay a step of averaged weights; 0: none are kept
    max_skips: Annotated[int, Field(ge=0)] = (
        0  # steps in a row that may be left out for want of finite numbers
    )
    global_batch: Positive = 2048  # samples an optimizer step, whatever the number of workers
    micro_batch: Positive = 64  # samples a forward pass: batch norm sees these

    @model_validator(mode="after")
    def _whole_micro_batches(self) -> "OptimConfig":
        if self.global_batch % self.micro_batch:
            near = max(1, round(self.global_batch / self.micro_batch)) * self.micro_batch
            raise ValueError(
                f"global_batch {self.global_batch} is not a multiple of micro_batch {self.micro_batch}; "
                f"{near} would be"
            )
        if self.warmup_epochs >= self.epochs:
            raise ValueError(f"warmup_epochs {self.warmup_epochs} must be below epochs {self.epochs}")
        return self


class ComputeConfig(Section):
    """How the numbers are computed: all of it changes them a little."""

    precision: Literal["fp32", "tf32", "bf16", "fp16"] = (
        "fp32"  # of products and convolutions; weights are float32
    )
    compile: bool = False  # torch.compile
    sync_bn: bool = False  # batch norm over the micro-batches of all ranks, not each; CUDA


class Config(Section):
    """What to compute. Where to compute it is `Resources`; the two never mix."""

    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    # A run (its name, or a path) or a registered model (models:/NAME@ALIAS) whose weights are the first ones;
    # with other classes the head is new.
    init: str | None = None
    probe: bool = False  # record after each epoch what every GSA module does: gsa/content_rms/MODULE ...
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    augment: AugmentConfig = AugmentConfig()
    optim: OptimConfig = OptimConfig()
    compute: ComputeConfig = ComputeConfig()

    @property
    def micro_batches(self) -> int:
        """Micro-batches in a global batch: the number of workers has to divide it."""
        return self.optim.global_batch // self.optim.micro_batch


class Resources(Section):
    """Where to compute: workers (or min..max) and what each holds. Not fingerprinted."""

    workers: str = Field(default="1", pattern=SPAN)
    cpus_per_worker: Positive = 1
    gpus_per_worker: Annotated[float, Field(ge=0)] = 0
    save_minutes: Annotated[float, Field(ge=0)] = 10.0  # between checkpoints within an epoch
    profile: Annotated[int, Field(ge=0)] = 0  # steps of which each worker writes a trace

    @property
    def span(self) -> tuple[int, int]:
        """Fewest and most workers."""
        low, _, high = self.workers.partition("..")
        return int(low), int(high or low)

    def check(self, config: Config) -> None:
        """Refuse worker counts that cannot share the global batch equally."""
        low, high = self.span
        if config.compute.sync_bn and not self.gpus_per_worker:
            raise ConfigError(
                "compute.sync_bn needs GPUs; next: --gpus-per-worker 1, or compute.sync_bn=false"
            )
        if low > high:
            raise ConfigError(f"workers {self.workers}: the lower bound is above the upper one")
        k = config.micro_batches
        good = [n for n in range(1, k + 1) if k % n == 0]
        bad = next((n for n in range(low, high + 1) if n not in good), None)
        if bad:
            raise ConfigError(
                f"workers {self.workers}: {bad} workers cannot share a global batch of "
                f"{config.optim.global_batch} = {k} micro-batches of {config.optim.micro_batch}; "
                f"{', '.join(map(str, good))} could. Next: change --workers or optim.micro_batch"
            )


class _Loader(yaml.SafeLoader):
    """YAML 1.2 floats (1e-3 is a number), no duplicate keys, no aliases (they can blow up)."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases (*name) are not allowed here")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.YAMLError(f"{key.value} is given twice")
                seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


def parse_yaml(text: str, where: str) -> Any:
    """YAML text to plain values; `where` names its source in errors."""
    if len(text) > MAX_YAML_BYTES:
        raise ConfigError(f"{where}: expected at most {MAX_YAML_BYTES} bytes of YAML, got {len(text)}")
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError, RecursionError, LookupError, AttributeError) as error:
        # The last two: what PyYAML itself stumbles over, such as `!!float ""` and `!!timestamp x`.
        raise ConfigError(f"{where}: not readable as YAML: {' '.join(str(error).split())}") from None


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file that holds one mapping."""
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(MAX_YAML_BYTES + 1)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    values = parse_yaml(text, str(path))
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected fields (name: value), got {type(values).__name__}")
    return values


def recipe_path(kind: str, name: str) -> Path:
    """The file of a recipe: `name` is a shipped recipe's, or the path of a YAML file."""
    assert kind in RECIPE_KINDS, kind
    if name.endswith((".yaml", ".yml")):
        path = Path(name)
        if not path.is_file():
            raise ConfigError(f"{path}: no such recipe file; shipped: {', '.join(recipe_names(kind))}")
        return path
    if name not in recipe_names(kind):
        raise ConfigError(
            f"{kind} recipe {name} is unknown{suggest(name, recipe_names(kind))} "
            f"(shipped: {', '.join(recipe_names(kind))}; or give the path of a .yaml file)"
        )
    return _shipped() / kind / f"{name}.yaml"


def recipe_names(kind: str) -> list[str]:
    """The shipped recipes of a kind."""
    return sorted(p.stem for p in (_shipped() / kind).glob("*.yaml"))


def _shipped() -> Path:
    return Path(str(resources.files("pipeline"))) / "recipes"


S = TypeVar("S", bound=Section)


def load(schema: type[S], kind: str, name: str, overrides: Sequence[str] = ()) -> S:
    """A recipe by name or path, with `section.field=value` overrides, validated.

    Raises ConfigError: unknown recipe or field, wrong type, impossible value.
    """
    path = recipe_path(kind, name)
    values = read_yaml(path)
    for override in overrides:
        _set(values, override)
    return validate(schema, values, where=f"{kind} recipe {path.stem}")


def override(config: S, overrides: Sequence[str]) -> S:
    """The same settings with `section.field=value` overrides."""
    values = config.model_dump(mode="json")
    for text in overrides:
        _set(values, text)
    return validate(type(config), values, where="overrides")


def validate(schema: type[S], values: Any, where: str) -> S:
    """Plain values to a settings object; every fault becomes one line of a ConfigError."""
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        lines = [_explain(schema, fault) for fault in error.errors()]
        raise ConfigError(f"{where}: " + "; ".join(lines)) from None


def dump(config: Section) -> str:
    """The settings as YAML text, every field stated."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def flat(config: Section) -> dict[str, Any]:
    """The settings as {"optim.lr": 0.1, ...}."""

    def walk(values: dict[str, Any], prefix: str) -> Iterable[tuple[str, Any]]:
        for key, value in values.items():
            if isinstance(value, dict):
                yield from walk(value, f"{prefix}{key}.")
            else:
                yield prefix + key, value

    return dict(walk(config.model_dump(mode="json"), ""))


def fingerprint(config: Config, shards_digest: str, init_digest: str | None = None) -> str:
    """16 hex digits that identify a run: the settings, with shards and first weights by content, not by name."""
    values = config.model_dump(mode="json")
    values["data"]["shards"], values["init"] = shards_digest, init_digest
    return digest(values)


def digest(values: Any) -> str:
    """16 hex digits of plain values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def suggest(word: str, known: Iterable[str]) -> str:
    """`; did you mean X?` or nothing."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else ""


def _set(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"override {override!r}: expected section.field=value")
    *sections, field = key.strip().split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise ConfigError(f"override {override!r}: {section} is a value, not a section")
    values[field] = parse_yaml(text, f"override {key}")


def _explain(schema: type[Section], fault: Any) -> str:
    *sections, field = (str(part) for part in fault["loc"]) if fault["loc"] else ("settings",)
    name = ".".join([*sections, field])
    if fault["type"] == "extra_forbidden":
        fields = _fields(schema, sections)
        known = suggest(field, fields)
        full = known.replace("did you mean ", "did you mean " + "".join(s + "." for s in sections))
        return f"{name} is unknown{full} (fields: {', '.join(fields)})"
    message = re.sub(r"^\w+ should (be|have)", "expected", fault["msg"].removeprefix("Value error, "))
    if fault["type"] == "value_error":
        return f"{name}: {message}"
    if fault["type"] == "string_pattern_mismatch":
        expected, move = PATTERNS[fault["ctx"]["pattern"]]
        return f"{name}: expected {expected}, got {fault['input']!r}; next: {move}"
    return f"{name}: {message}, got {fault['input']!r}"


def _fields(schema: type[Section], sections: Sequence[str]) -> list[str]:
    for section in sections:
        if section in schema.model_fields:  # else the key of a mapping: its values are meant
            nested = _types(schema.model_fields[section].annotation)
            schema = next((t for t in nested if isinstance(t, type) and issubclass(t, Section)), Section)
    return list(schema.model_fields)


def _types(annotation: Any) -> list[Any]:
    return [annotation, *(found for part in get_args(annotation) for found in _types(part))]
