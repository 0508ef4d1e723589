"""Recipes: all shipped ones load; every mistake is one line that names it; the fingerprint knows each field."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from pipeline.config import (
    MAX_YAML_BYTES,
    RECIPE_KINDS,
    Config,
    ConfigError,
    Name,
    Resources,
    Section,
    dump,
    fingerprint,
    flat,
    load,
    override,
    parse_yaml,
    read_yaml,
    recipe_names,
    recipe_path,
    validate,
)
from pipeline.plan import build_model, prepare
from pipeline.rundir import Out
from pipeline.sweep import Sweep, stated_points

SHIPPED = [(kind, name) for kind in RECIPE_KINDS for name in recipe_names(kind)]
ASKED = {("workflow", "folder"): ["shards.input=photos"]}  # what a recipe leaves to its user


def schema(kind: str) -> type[Section]:
    if kind == "workflow":
        from pipeline.workflow import Workflow

        return Workflow
    return {"train": Config, "sweep": Sweep}[kind]


def fault(action: Callable[[], Any]) -> str:
    """The message of the ConfigError that the action ends in: one line, as a user reads it."""
    with pytest.raises(ConfigError) as caught:
        action()
    message = str(caught.value)
    assert len(message.splitlines()) == 1, message
    return message


# --- recipes -----------------------------------------------------------------------------------------------


def test_each_kind_has_a_recipe() -> None:
    assert {kind for kind, _ in SHIPPED} == set(RECIPE_KINDS)


@pytest.mark.parametrize(("kind", "name"), SHIPPED)
def test_every_shipped_recipe_loads_and_starts_with_its_result_cost_and_command(kind: str, name: str) -> None:
    load(schema(kind), kind, name, ASKED.get((kind, name), []))
    first = recipe_path(kind, name).read_text().splitlines()[:3]
    assert [line.split(":")[0] for line in first] == ["# Result", "# Cost", "# Command"]


@pytest.mark.parametrize("name", recipe_names("sweep"))
def test_every_point_of_a_shipped_sweep_is_a_config(name: str) -> None:
    sweep = load(Sweep, "sweep", name)
    points = stated_points(sweep)
    assert len(points) > 1
    for point in points:
        values = [f"{key}={json.dumps(value)}" for key, value in point.items()]
        load(Config, "train", sweep.train, [*sweep.overrides, *values])


def test_a_recipe_is_found_by_name_or_by_path(tmp_path: Path) -> None:
    path = tmp_path / "my own.yaml"
    path.write_text("seed: 5\n")
    assert load(Config, "train", str(path)) == Config(seed=5)
    assert recipe_path("train", "digits").parts[-3:] == ("recipes", "train", "digits.yaml")
    unknown = fault(lambda: recipe_path("train", "digit"))
    shipped = ", ".join(recipe_names("train"))
    assert unknown.startswith(f"train recipe digit is unknown; did you mean digits? (shipped: {shipped};")
    assert f"no such recipe file; shipped: {shipped}" in fault(lambda: recipe_path("train", "digits.yml"))


def test_the_command_line_is_stronger_than_the_recipe_and_the_recipe_than_the_defaults() -> None:
    config = load(Config, "train", "digits", ["optim.lr=1e-3", "optim.lr=2e-3", "model.window=3"])
    assert config.optim.lr == 2e-3
    assert config.model.window == 3
    assert config.optim.weight_decay == 5e-4  # the recipe's
    assert config.optim.momentum == Config().optim.momentum


def test_override_makes_a_new_config_and_a_config_never_changes() -> None:
    old = Config()
    assert override(old, ["optim.epochs=3", "optim.warmup_epochs=1"]).optim.epochs == 3
    assert old == Config()
    with pytest.raises(ValidationError, match="frozen"):
        old.optim.epochs = 3  # type: ignore[misc]


# --- YAML --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("1E3", 1e3),
        ("-2.5e+4", -2.5e4),
        (".5e1", 5.0),
        ("1.e2", 100.0),
        ("+1e0", 1.0),
        ("0.1", 0.1),
    ],
)
def test_numbers_are_numbers(text: str, value: float) -> None:
    found = parse_yaml(f"lr: {text}", "here")["lr"]
    assert (type(found), found) == (float, value)


@pytest.mark.parametrize("text", ["e3", "1e", "1e3x", "v1e-3", "1.2.3e4", "'1e3'", "cggg"])
def test_words_stay_words(text: str) -> None:
    assert parse_yaml(f"name: {text}", "here") == {"name": text.strip("'")}


@settings(max_examples=40, deadline=None)  # the machine may be shared
@given(
    lr=st.floats(1e-300, 1e300),
    decay=st.floats(0, 1),
    shards=st.text(min_size=1),
    placement=st.none() | st.text(),
    scale=st.tuples(st.floats(1e-6, 0.5), st.floats(0.5, 1)),
)
def test_what_is_dumped_is_read_back_the_same(
    lr: float, decay: float, shards: str, placement: str | None, scale: tuple[float, float]
) -> None:
    values = {
        "model": {"placement": placement},
        "data": {"shards": shards, "crop_scale": scale},
        "optim": {"lr": lr, "weight_decay": decay},
    }
    config = Config.model_validate(values)
    assert validate(Config, parse_yaml(dump(config), "here"), "here") == config


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 1\na: 2", "a is given twice"),
        ("s:\n  x: 1\n  y: 2\n  x: 3", "x is given twice"),
        ("a: &x [1]\nb: *x", "aliases"),
        ("a: &a [x,x]\nb: &b [*a,*a]\nc: &c [*b,*b]", "aliases"),
        ("a: &x {b: 1}\nc: {<<: *x}", "aliases"),
        ("a: !!python/name:os.system", "python/name"),
        ("a: !!python/tuple [1]", "python/tuple"),
        ("a: !own 3", "!own"),
        ("a: [1, 2", "expected"),
        ("a:\n\t- b", "cannot start any token"),
        ("a: b: c", "mapping values are not allowed"),
        ("a: '", "end of stream"),
        ("a: \0", "unacceptable character"),
        ("{" * 5000, "recursion"),
        ("{[a]: 1}", "unhashable key"),
        ("? {a: 1}\n: 1\n? {a: 1}\n: 2", "unhashable key"),
        ('a: !!float ""', "string index out of range"),
        ("a: !!bool maybe", "maybe"),
        ("a: !!timestamp never", "groupdict"),
        ("a: !!int x", "invalid literal"),
        ("a: 2020-13-45", "month must be in 1..12"),
        ("a: " + "9" * 5000, "4300 digits"),
        ("--- 1\n--- 2", "expected a single document"),
    ],
    ids=lambda text: text[:20],
)
def test_yaml_that_is_wrong_or_dangerous_is_refused(text: str, words: str) -> None:
    message = fault(lambda: parse_yaml(text, "here"))
    assert message.startswith("here: not readable as YAML: ")
    assert words in message


def test_no_tag_runs_code(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    for tag in ("python/object/apply:os.system", "python/object/new:os.system"):
        fault(lambda tag=tag: parse_yaml(f"a: !!{tag} ['touch {canary}']", "here"))
    assert not canary.exists()


def test_oversized_yaml_is_refused_before_it_is_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "big.yaml"
    with open(path, "wb") as file:
        file.truncate(1 << 40)  # sparse: reading it would end in a MemoryError
    assert f"expected at most {MAX_YAML_BYTES} bytes of YAML" in fault(lambda: read_yaml(path))
    path.write_text("a: " + "x" * (MAX_YAML_BYTES - 3))
    assert len(read_yaml(path)["a"]) == MAX_YAML_BYTES - 3


def test_what_is_no_file_of_fields_is_refused(tmp_path: Path) -> None:
    (tmp_path / "list.yaml").write_text("[1, 2]")
    (tmp_path / "empty.yaml").write_text("")
    (tmp_path / "latin.yaml").write_bytes(b"name: caf\xe9")
    expected = "expected fields (name: value), got"
    assert f"{expected} list" in fault(lambda: read_yaml(tmp_path / "list.yaml"))
    assert f"{expected} NoneType" in fault(lambda: read_yaml(tmp_path / "empty.yaml"))
    assert "cannot be read: 'utf-8' codec" in fault(lambda: read_yaml(tmp_path / "latin.yaml"))
    assert "cannot be read: [Errno 21]" in fault(lambda: read_yaml(tmp_path))
    assert "cannot be read: [Errno 2]" in fault(lambda: read_yaml(tmp_path / "none.yaml"))


# --- mistakes in fields ------------------------------------------------------------------------------------

FIELDS = "fields: seed, init, probe, model, data, augment, optim, compute"
OPTIM_FIELDS = (
    "fields: name, lr, lr_rule, schedule, step_epochs, momentum, weight_decay, epochs, warmup_epochs, loss, "
    "label_smoothing, clip_norm, ema, max_skips, global_batch, micro_batch"
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optim.lrr=1", f"optim.lrr is unknown; did you mean optim.lr? ({OPTIM_FIELDS})"),
        (
            "modle.name=x",
            f"modle is unknown; did you mean model? ({FIELDS})",
        ),
        ("zzz=1", f"zzz is unknown ({FIELDS})"),
        ("optim..lr=3", f"optim. is unknown ({OPTIM_FIELDS})"),
        ("optim.lr='0.1'", "optim.lr: expected a valid number, got '0.1'"),
        ("optim.lr=", "optim.lr: expected a valid number, got None"),
        ("optim.epochs=2.0", "optim.epochs: expected a valid integer, got 2.0"),
        ("optim.epochs=true", "optim.epochs: expected a valid integer, got True"),
        ("model.query_softmax=1", "model.query_softmax: expected a valid boolean, got 1"),
        ("model.name=5", "model.name: expected a valid string, got 5"),
        ("model=5", "model: expected a valid dictionary or instance of ModelConfig, got 5"),
        ("model.drop_path=1", "model.drop_path: expected less than 1, got 1"),
        ("model.drop_path=-0.1", "model.drop_path: expected greater than or equal to 0, got -0.1"),
        ("model.stem=big", "model.stem: expected 'imagenet' or 'small', got 'big'"),
        ("optim.lr=0", "optim.lr: expected greater than 0, got 0"),
        ("optim.lr=.inf", "optim.lr: expected a finite number, got inf"),
        ("optim.lr=.nan", "optim.lr: expected a finite number, got nan"),
        ("optim.momentum=1", "optim.momentum: expected less than 1, got 1"),
        ("optim.epochs=0", "optim.epochs: expected greater than 0, got 0"),
        ("seed=-1", "seed: expected greater than or equal to 0, got -1"),
        ("seed=9223372036854775808", "seed: expected less than 9223372036854775808, got 9223372036854775808"),
        ("data.crop_pct=0", "data.crop_pct: expected greater than 0, got 0"),
        ("data.crop_pct=1.1", "data.crop_pct: expected less than or equal to 1, got 1.1"),
        ("data.crop_scale=[0, 2]", "data.crop_scale.1: expected less than or equal to 1, got 2"),
        ("data.crop_scale=['0.1', 1]", "data.crop_scale.0: expected a valid number, got '0.1'"),
        (
            "data.crop_scale=[1, 0.5]",
            "data: crop_scale [1.0, 0.5]: expected smallest and largest share of the area, above 0",
        ),
        (
            "data.crop_scale=[0, 1]",
            "data: crop_scale [0.0, 1.0]: expected smallest and largest share of the area, above 0",
        ),
        (
            "optim.global_batch=100",
            "optim: global_batch 100 is not a multiple of micro_batch 32; 96 would be",
        ),
        ("optim.global_batch=8", "optim: global_batch 8 is not a multiple of micro_batch 32; 32 would be"),
        ("optim.warmup_epochs=20", "optim: warmup_epochs 20.0 must be below epochs 20"),
    ],
)
def test_a_wrong_field_is_named_with_what_was_expected(text: str, message: str) -> None:
    assert fault(lambda: load(Config, "train", "digits", [text])) == f"train recipe digits: {message}"


def test_all_faults_come_in_one_line() -> None:
    message = fault(lambda: load(Config, "train", "digits", ["optim.lrr=1", "model.heads=0"]))
    assert "optim.lrr is unknown" in message
    assert (
        "; model.heads: expected greater than 0, got 0" in message or "model.heads" in message.split(";")[0]
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("asha.graze_epochs=3", "asha.graze_epochs is unknown; did you mean asha.grace_epochs?"),
        ("asha.reduction=1", "asha.reduction: expected greater than or equal to 2, got 1"),
        ("parameters={}", "parameters: expected at least 1 item"),
        (
            "parameters.optim=3",
            "parameters.optim: expected a list of values, or a range such as {uniform: [0, 1]}, got 3",
        ),
        ("mode=best", "mode: expected 'max' or 'min', got 'best'"),
        (
            "name=../x",
            "name: expected 1 to 64 letters, digits, '.', '_' or '-', a letter or digit first, got '../x'; next: ",
        ),
    ],
)
def test_the_faults_of_a_sweep_are_named_too(text: str, message: str) -> None:
    found = fault(lambda: load(Sweep, "sweep", "digits", [text]))
    assert found.startswith(f"sweep recipe digits: {message}")


def test_a_missing_field_is_named() -> None:
    assert "parameters: Field required" in fault(lambda: validate(Sweep, {"name": "x", "train": "y"}, "here"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optim.lr", "override 'optim.lr': expected section.field=value"),
        ("=3", "override '=3': expected section.field=value"),
        ("", "override '': expected section.field=value"),
        ("optim.lr.x=3", "override 'optim.lr.x=3': lr is a value, not a section"),
        ("optim.lr=[1,", "override optim.lr: not readable as YAML: "),
        ("optim.lr=*x", "override optim.lr: not readable as YAML: aliases (*name) are not allowed here"),
        ("a\nb", r"override 'a\nb': expected section.field=value"),
    ],
)
def test_a_bad_override_is_named(text: str, message: str) -> None:
    assert fault(lambda: load(Config, "train", "digits", [text])).startswith(message)


@pytest.mark.parametrize(
    "name", ["", "..", ".", "-x", "a/b", "a b", "a\n", "a" * 65, "ä", "a;b", "$(x)", "a\0", "\u2028"]
)
def test_a_name_reaches_no_path_and_no_shell(name: str) -> None:
    class Named(Section):
        name: Name

    assert "name: expected 1 to 64 letters" in fault(lambda: validate(Named, {"name": name}, "here"))
    validate(Named, {"name": "a.B-0_" + "c" * 58}, "here")


# --- fingerprint -------------------------------------------------------------------------------------------

CHANGED = {
    "seed": 1,
    "probe": "true",
    "model.name": "resnet50",
    "model.stem": "small",
    "model.placement": "cggg",
    "model.components": "content",
    "model.window": 3,
    "model.heads": 4,
    "model.query_softmax": "true",
    "model.drop_path": 0.1,
    "data.image_size": 192,
    "data.test_size": 256,
    "data.start_size": 128,
    "data.crop_scale": "[0.1, 1.0]",
    "data.flip": 0.25,
    "data.crop_pct": 0.9,
    "data.shuffle_block": 1000,
    "data.repeats": 3,
    "data.max_bad": 0.01,
    "data.stream": "a data.stream_samples=9",  # both or none
    "data.stream_samples": "9 data.stream=b",
    "augment.policy": "randaugment",
    "augment.ops": 3,
    "augment.magnitude": 10,
    "augment.color_jitter": 0.4,
    "augment.erase": 0.25,
    "augment.mixup": 0.2,
    "augment.cutmix": 1.0,
    "optim.name": "adamw",
    "optim.lr": 0.1000001,
    "optim.lr_rule": "none",
    "optim.schedule": "step",
    "optim.step_epochs": 20,
    "optim.loss": "bce",
    "optim.clip_norm": 1.0,
    "optim.ema": 0.999,
    "optim.max_skips": 2,
    "optim.momentum": 0.8,
    "optim.weight_decay": 0,
    "optim.epochs": 91,
    "optim.warmup_epochs": 4,
    "optim.label_smoothing": 0,
    "optim.global_batch": 4096,
    "optim.micro_batch": 32,
    "compute.precision": "bf16",
    "compute.compile": "true",
    "compute.sync_bn": "true",
}


def test_changing_any_field_changes_the_fingerprint() -> None:
    """A new field has to get a line in CHANGED."""
    assert {*CHANGED, "data.shards", "init"} == set(flat(Config()))
    changes = [re.split(r" (?=data)", f"{k}={v}") for k, v in CHANGED.items()]
    prints = {fingerprint(override(Config(), change), "d") for change in changes}
    prints.add(fingerprint(Config(), "d"))
    prints.add(fingerprint(Config(), "other pictures"))
    prints.add(fingerprint(Config(), "d", "first weights"))
    assert len(prints) == len(CHANGED) + 3
    assert all(re.fullmatch("[0-9a-f]{16}", p) for p in prints)


def test_drop_path_reaches_the_network() -> None:
    config = load(Config, "train", "digits", ["model.drop_path=0.3"])
    network = build_model(config, 10, device="meta")
    assert [group[0].drop_path for group in network.groups] == pytest.approx([0, 0.1, 0.2, 0.3])


def test_the_name_of_the_shards_and_the_spelling_of_numbers_do_not_change_it() -> None:
    same = [
        Config(),
        override(Config(), ["data.shards=elsewhere"]),
        override(Config(), ["init=weights-of-the-same-digest"]),
        override(Config(), ["optim.warmup_epochs=5", "optim.lr=1e-1", "data.crop_scale=[8e-2, 1]"]),
        validate(Config, {}, "here"),
    ]
    assert len({fingerprint(c, "d") for c in same}) == 1


def test_equal_networks_make_one_run(out: Out, mini_config: Any) -> None:
    (out.root / "shards" / "again").symlink_to(out.shards("mini").resolve())
    spellings: list[dict[str, Any]] = [{"placement": p} for p in (None, "all", "gggg", "g/g/g/g", "last:4")]
    spellings += [{"components": "row+content+column"}, {"shards": "again", "window": None}]
    assert len({prepare(out, mini_config(**s)).name for s in spellings}) == 1
    others: list[dict[str, Any]] = [{"placement": "cggg"}, {"components": "row+column"}, {"seed": 1}, {}]
    assert len({prepare(out, mini_config(**s)).name for s in others}) == 4


# --- where to compute --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("workers", "span"), [("1", (1, 1)), ("12", (12, 12)), ("1..4", (1, 4)), ("10..2", (10, 2))]
)
def test_workers_are_a_number_or_a_span(workers: str, span: tuple[int, int]) -> None:
    assert Resources(workers=workers).span == span


@pytest.mark.parametrize("workers", ["0", "-1", "..3", "1..", "1...3", "a", "1.5", "1..2\n", " 1", "", 2])
def test_other_workers_are_refused(workers: Any) -> None:
    assert "workers: " in fault(lambda: validate(Resources, {"workers": workers}, "here"))


@pytest.mark.parametrize(
    ("workers", "message"),
    [
        ("1", None),
        ("4", None),
        ("1..2", None),
        ("3", "3 workers cannot share a global batch of 16 = 4 micro-batches of 4; 1, 2, 4 could. Next: "),
        ("1..4", "3 workers cannot share"),
        ("8", "8 workers cannot share"),
        ("4..1", "the lower bound is above the upper one"),
        ("1..999999999999999", "3 workers cannot share"),
    ],
)
def test_workers_have_to_share_the_global_batch_equally(
    workers: str, message: str | None, mini_config: Any
) -> None:
    resources = Resources(workers=workers)
    if message is None:
        resources.check(mini_config())
    else:
        assert fault(lambda: resources.check(mini_config())).startswith(f"workers {workers}: {message}")
