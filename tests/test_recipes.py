"""Recipes: the network, the batch and the rates that each one's head and source state; the points of sweeps."""

import re
import shlex
from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import pyarrow as pa
import pytest
import torch

from gsa_models import model_cost
from gsa_models.cost import FIGURES, written_as
from pipeline.config import Config, Resources, load, recipe_names, recipe_path
from pipeline.manifest import SCHEMA, Shard, write_manifest
from pipeline.optim import lr_at, peak_lr
from pipeline.order import steps_per_epoch
from pipeline.plan import at_size, build_model
from pipeline.rundir import Out
from pipeline.sweep import Sweep, Trial, lay_out, name_of, stated_points, trials_of


class Facts(NamedTuple):
    """What a recipe comes to; the sets' sizes are theirs, the parameters the paper's counts (see cost.py)."""

    classes: int
    samples: int
    steps: int  # of all epochs
    peak: float  # the highest learning rate
    params: int  # of the network that is tested
    twin: int  # of its convolution twin


IMAGENET = (1000, 1_281_167)
FACTS = {
    "imagenet_paper": Facts(*IMAGENET, 56_250, 0.8, 18_052_856, 25_557_032),
    "imagenet_a3": Facts(*IMAGENET, 62_500, 8e-3, 18_052_856, 25_557_032),
    "imagenet_a2": Facts(*IMAGENET, 187_500, 5e-3, 18_052_856, 25_557_032),
    "imagenet_tv2": Facts(*IMAGENET, 750_600, 0.5, 18_052_856, 25_557_032),
    "cifar100_finetune": Facts(100, 50_000, 10_140, 5e-3, 16_208_756, 23_712_932),
    "cifar100": Facts(100, 50_000, 78_000, 0.1, 16_186_484, 23_705_252),
}
SMALL = {"digits": (10, 1438), "folder": (10, 1600)}  # classes, samples; of a folder any
RECIPES = recipe_names("train")
OVERRIDE = r"\b(?:model|data|augment|optim|compute)\.\w+=[\w.]*\w"
TOGETHER = re.compile(rf"{OVERRIDE}(?: {OVERRIDE})*")


def head(name: str, kind: str = "train") -> str:
    lines = recipe_path(kind, name).read_text().splitlines()
    return "\n".join(line for line in lines if line.startswith("#"))


def commands(name: str, kind: str = "train") -> list[list[str]]:
    """The words of each command that the head names."""
    line = next(line for line in head(name, kind).splitlines() if line.startswith("# Command: "))
    return [shlex.split(part) for part in line.removeprefix("# Command: ").split("&&")]


def test_every_recipe_is_tested_here() -> None:
    assert sorted([*FACTS, *SMALL]) == RECIPES


@pytest.mark.parametrize("name", RECIPES)
def test_its_network_is_built_and_takes_the_pictures_of_training_and_of_testing(name: str) -> None:
    config = load(Config, "train", name)
    classes = FACTS[name].classes if name in FACTS else SMALL[name][0]
    for size in {config.data.image_size, config.data.eval_size}:
        network = build_model(at_size(config, size), classes, device="meta")
        pictures = torch.empty(config.optim.micro_batch, 3, size, size, device="meta")
        assert network(pictures).shape == (config.optim.micro_batch, classes)


@pytest.mark.parametrize("name", RECIPES)
def test_its_command_is_its_own_and_its_workers_share_the_batch(name: str) -> None:
    *_, train = commands(name)
    assert train[:3] == ["gsa", "train", name]
    options = dict(zip(train[3::2], train[4::2], strict=True))
    assert options.keys() <= {"--workers", "--gpus-per-worker"}
    Resources(workers=options.get("--workers", "1")).check(load(Config, "train", name))


@pytest.mark.parametrize("name", RECIPES)
def test_what_its_head_says_to_change_can_be_changed(name: str) -> None:
    for changes in TOGETHER.findall(head(name)):
        config = load(Config, "train", name, changes.split())
        assert config != load(Config, "train", name), f"{changes} is what the recipe says"
        build_model(config, 10, device="meta")


@pytest.mark.parametrize("name", FACTS)
def test_its_steps_rates_and_parameters_are_those_of_its_source(name: str) -> None:
    facts, config = FACTS[name], load(Config, "train", name)
    optim = config.optim
    steps = steps_per_epoch(facts.samples, optim.global_batch)
    assert steps * optim.epochs == facts.steps
    assert peak_lr(optim) == pytest.approx(facts.peak)
    assert max(lr_at(step, optim, steps=steps) for step in range(6 * steps)) == pytest.approx(facts.peak)
    for network, params in ((config.model.name, facts.params), ("resnet50", facts.twin)):
        changed = load(Config, "train", name, [f"model.name={network}"])
        model = build_model(at_size(changed, config.data.eval_size), facts.classes, device="meta")
        assert sum(p.numel() for p in model.parameters()) == params


@pytest.mark.parametrize("name", FACTS)
def test_the_operations_of_its_head_are_counted(name: str) -> None:
    facts, config = FACTS[name], load(Config, "train", name)
    found = re.search(r"([\d.]+) (exa|peta)FLOP counted", head(name))
    assert found
    size = config.data.image_size
    image = 3 * model_cost(build_model(config, facts.classes, device="meta"), size).flops
    told = float(found[1]) * {"exa": 1e18, "peta": 1e15}[found[2]]
    assert told == pytest.approx(image * facts.samples * config.optim.epochs, rel=5e-3)


def test_the_paper_fine_tunes_at_four_rates() -> None:
    optim = load(Config, "train", "cifar100_finetune").optim
    rates = [lr_at(step, optim, steps=390) for step in (0, 2999, 3000, 5999, 6000, 8999, 9000, 10_139)]
    assert rates == pytest.approx([5e-3, 5e-3, 5e-4, 5e-4, 5e-5, 5e-5, 5e-6, 5e-6])


def test_the_averages_of_tv2_move_as_fast_as_torchvisions() -> None:
    """There once in 32 steps, by 0.00002 * batch * 32 / epochs."""
    optim = load(Config, "train", "imagenet_tv2").optim
    assert optim.ema**32 == pytest.approx(1 - 2e-5 * optim.global_batch * 32 / optim.epochs, abs=1e-5)


# --- sweeps ------------------------------------------------------------------------------------------------

POINTS = {  # that are known before; of pbt a generation
    "components_imagenet": 7,
    "components_digits": 7,
    "placement_imagenet": 8,
    "placement_digits": 8,
    "window_imagenet": 5,
    "window_digits": 4,
    "softmax_imagenet": 2,
    "softmax_digits": 2,
    "heads_imagenet": 4,
    "heads_digits": 4,
    "lr_wd_imagenet": 16,
    "lr_wd_digits": 16,
    "pbt_digits": 8,
    "digits": 6,
    "folder": 4,
}
STUDIES = ("components", "placement", "window", "softmax", "heads")
SETS = {"imagenet": (1000, 2048), **SMALL}  # of ImageNet one global batch: no recipe needs more to be checked


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Out:
    """Manifests for all sweeps, of pictures that are not there."""
    out = Out(tmp_path_factory.mktemp("sets"))
    for name, (classes, samples) in SETS.items():
        folder = out.shards(name)
        folder.mkdir(parents=True)
        sizes = {"train": samples, "val": 10}
        shards = [Shard(f"{split}-000000.tar", split, "0" * 64, 1, size) for split, size in sizes.items()]
        rows = [
            (shard.split, shard.name, f"{i}", 0, "png", 0, 1, 0, 1, 1)
            for shard in shards
            for i in range(shard.samples)
        ]
        columns = zip(SCHEMA, zip(*rows, strict=True), strict=True)
        table = pa.table([pa.array(c, type=f.type) for f, c in columns], schema=SCHEMA)
        write_manifest(folder, table, classes=[f"{c}" for c in range(classes)], shards=shards, made={})
    return out


@pytest.fixture(scope="module")
def laid_out(sets: Out) -> Callable[[str], tuple[list[Trial], list[str]]]:
    """laid_out(name): the trials of a shipped sweep, and the faults of its points."""

    @cache
    def lay(name: str) -> tuple[list[Trial], list[str]]:
        sweep = load(Sweep, "sweep", name)
        return lay_out(stated_points(sweep), partial(trials_of, sets, sweep))

    return lay


def test_every_sweep_is_tested_here() -> None:
    assert sorted(POINTS) == recipe_names("sweep")


@pytest.mark.parametrize("name", POINTS)
def test_all_points_of_a_sweep_can_be_trained_and_are_different_runs(name: str, laid_out: Any) -> None:
    sweep, (trials, faults) = load(Sweep, "sweep", name), laid_out(name)
    assert not faults
    assert sweep.name == name
    assert len({name_of(trial.point) for trial in trials}) == POINTS[name]
    assert len(trials) == POINTS[name] * sweep.seeds


@pytest.mark.parametrize("name", POINTS)
def test_the_command_of_a_sweep_is_its_own_and_its_workers_share_the_batch(name: str, laid_out: Any) -> None:
    *_, tune = commands(name, "sweep")
    assert tune[:3] == ["gsa", "tune", name]
    options = dict(zip(tune[3::2], tune[4::2], strict=True))
    assert options.keys() <= {"--workers", "--gpus-per-worker", "--concurrent"}
    for trial in laid_out(name)[0]:
        Resources(workers=options.get("--workers", "1")).check(trial.plan.config)


@pytest.mark.parametrize("name", [name for name in POINTS if name.split("_")[0] in ("window", "heads")])
def test_each_window_and_number_of_heads_is_another_network(name: str, laid_out: Any) -> None:
    """A window that is wider than every map, say, would be the global one once more."""
    trials, _ = laid_out(name)
    assert len({(trial.plan.cost.flops, trial.plan.cost.params) for trial in trials}) == POINTS[name]


@pytest.mark.parametrize("name", [n for n in POINTS if load(Sweep, "sweep", n).baseline])
def test_a_baseline_is_one_of_the_points(name: str) -> None:
    sweep = load(Sweep, "sweep", name)
    assert sweep.baseline in stated_points(sweep)


def test_the_studies_have_a_baseline() -> None:
    studies = {name for name in POINTS if name.split("_")[0] in STUDIES}
    assert studies == {name for name in POINTS if load(Sweep, "sweep", name).baseline}


@pytest.mark.parametrize("study", ["components", "placement", "window"])
def test_the_points_of_an_ablation_are_the_paper_s_and_cost_what_they_cost(study: str, laid_out: Any) -> None:
    expected = {
        value: figure.expected
        for figure in FIGURES
        for field, value in figure.settings.items()
        if field == study and len(figure.settings) == 1
    }
    if study == "placement":
        expected["cccc"] = expected.pop("none")
    trials, _ = laid_out(f"{study}_imagenet")
    got = {
        trial.point[f"model.{study}"]: written_as(expected[trial.point[f"model.{study}"]], trial.plan.cost)
        for trial in trials
    }
    assert got == expected
    assert all(trial.plan.config.data.image_size == 224 for trial in trials)


@pytest.mark.parametrize("study", STUDIES)
def test_a_study_on_imagenet_is_the_paper_s_recipe_but_for_its_field(study: str, laid_out: Any) -> None:
    base = load(Config, "train", "imagenet_paper")
    for trial in laid_out(f"{study}_imagenet")[0]:
        config = trial.plan.config
        assert config.model.name == "gsa_resnet50"
        assert config == base.model_copy(update={"model": config.model})


@pytest.mark.parametrize("name", [name for name in POINTS if name.endswith("_imagenet")])
def test_the_operations_of_a_sweep_s_head_are_counted(name: str, laid_out: Any) -> None:
    trials, _ = laid_out(name)
    found = re.search(r"([\d.]+) exaFLOP counted", head(name, "sweep"))
    assert found
    passes = sum(trial.plan.cost.flops * trial.plan.config.optim.epochs for trial in trials)
    assert float(found[1]) * 1e18 == pytest.approx(3 * passes * IMAGENET[1], rel=5e-3)


def test_the_rate_of_a_population_is_constant(laid_out: Any) -> None:
    """A generation begins its schedule anew: a rate that falls would do so in each."""
    for trial in laid_out("pbt_digits")[0]:
        optim = trial.plan.config.optim
        assert {lr_at(step, optim, steps=22) for step in range(22 * optim.epochs)} == {peak_lr(optim)}


@pytest.mark.parametrize("name", [n for n in POINTS if load(Sweep, "sweep", n).asha])
def test_early_stopping_looks_after_the_warm_up_and_before_the_end(name: str, laid_out: Any) -> None:
    sweep, optim = load(Sweep, "sweep", name), laid_out(name)[0][0].plan.config.optim
    assert sweep.asha
    assert optim.warmup_epochs < sweep.asha.grace_epochs < optim.epochs
