"""Train recipes: the network, the batch and the rates that each one's head and source state."""

import re
import shlex
from typing import NamedTuple

import pytest
import torch

from gsa_models import model_cost
from pipeline.config import Config, Resources, load, recipe_names, recipe_path
from pipeline.optim import lr_at, peak_lr
from pipeline.order import steps_per_epoch
from pipeline.plan import at_size, build_model


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


def head(name: str) -> str:
    lines = recipe_path("train", name).read_text().splitlines()
    return "\n".join(line for line in lines if line.startswith("#"))


def commands(name: str) -> list[list[str]]:
    """The words of each command that the head names."""
    line = next(line for line in head(name).splitlines() if line.startswith("# Command: "))
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
