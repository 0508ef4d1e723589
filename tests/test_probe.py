"""What a probe measures, against the reference and where it is known; and that it leaves no trace."""

import itertools
import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gsa_models.attention import COMPONENTS, GlobalSelfAttention, gsa_reference
from gsa_models.probe import ModuleFacts, metrics, probe
from gsa_models.resnet import ResNet
from gsa_models.zoo import create_model

SUBSETS = [subset for n in (1, 2, 3) for subset in itertools.combinations(COMPONENTS, n)]


def tiny(**settings: Any) -> ResNet:
    defaults: dict[str, Any] = {"stem": "small", "heads": 4}
    return create_model("gsa_resnet_tiny", num_classes=3, image_size=16, **(defaults | settings))


def images(*, batch: int = 2, size: int = 16, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0)).to(dtype)


def module(**settings: Any) -> GlobalSelfAttention:
    torch.manual_seed(0)
    defaults: dict[str, Any] = {"map_size": (3, 4), "heads": 2}
    gsa = GlobalSelfAttention(8, **(defaults | settings)).double()
    if gsa.mid_norm is not None:  # statistics that a norm in training mode would not use
        nn.init.constant_(gsa.mid_norm.running_mean, 0.3)  # type: ignore[arg-type]
        nn.init.constant_(gsa.mid_norm.running_var, 0.1)  # type: ignore[arg-type]
    return gsa


def features() -> Tensor:
    return torch.randn(2, 8, 3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def facts_of(gsa: GlobalSelfAttention, x: Tensor) -> ModuleFacts:
    (facts,) = probe(gsa, x).values()
    return facts


def rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


def trace(model: nn.Module) -> tuple[dict[str, Tensor], list[tuple[Any, ...]]]:
    """All that a probe might leave behind: the state, and each module's mode and hooks."""
    modules = [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}, modules


def assert_no_trace(model: nn.Module, before: tuple[dict[str, Tensor], list[tuple[Any, ...]]]) -> None:
    state, modules = trace(model)
    assert modules == before[1]
    assert all(torch.equal(tensor, before[0][name]) for name, tensor in state.items())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("query_softmax", [False, True])
@pytest.mark.parametrize("window", [None, 3])
def test_the_branches_are_those_of_the_reference(window: int | None, query_softmax: bool) -> None:
    gsa, x = module(window=window, query_softmax=query_softmax), features()
    gsa.eval()
    with torch.no_grad():
        both = gsa_reference(gsa, x)
        nn.init.zeros_(tables := gsa.row_table)  # type: ignore[arg-type]
        content = gsa_reference(gsa, x)
    assert tables is not None
    gsa = module(window=window, query_softmax=query_softmax)
    facts = facts_of(gsa, x)
    assert facts.content_rms == pytest.approx(rms(content), rel=1e-5)
    assert facts.positional_rms == pytest.approx(rms(both - content), rel=1e-5)


@pytest.mark.parametrize("components", SUBSETS, ids="+".join)
def test_a_branch_that_is_not_there_has_no_facts(components: tuple[str, ...]) -> None:
    facts = facts_of(module(components=components), features())
    content, positional = "content" in components, components != ("content",)
    assert (facts.content_rms is not None, facts.key_entropy is not None) == (content, content)
    assert (facts.positional_rms is not None) == positional


@pytest.mark.parametrize("components", [c for c in SUBSETS if c != ("content",)], ids="+".join)
def test_tables_of_zeros_give_no_positional_output(components: tuple[str, ...]) -> None:
    gsa = module(components=components)
    for table in (gsa.column_table, gsa.row_table):
        if table is not None:
            nn.init.zeros_(table)
    assert facts_of(gsa, features()).positional_rms == 0


def test_keys_of_zero_attend_to_all_pixels_alike() -> None:
    gsa = module()
    with torch.no_grad():
        gsa.qkv.weight[8:16] = 0
    assert facts_of(gsa, features()).key_entropy == pytest.approx(1)


def test_keys_that_pick_one_pixel_have_no_entropy() -> None:
    gsa, x = module(), torch.zeros(1, 8, 3, 4, dtype=torch.float64)
    x[:, :, 1, 2] = 1
    with torch.no_grad():
        gsa.qkv.weight[8:16] = 100.0
    assert facts_of(gsa, x).key_entropy == pytest.approx(0, abs=1e-6)


def test_the_entropy_is_that_of_the_softmax() -> None:
    """Two of twelve pixels share the weight."""
    gsa, x = module(), torch.zeros(1, 8, 3, 4, dtype=torch.float64)
    x[:, :, 0, :2] = 1
    with torch.no_grad():
        gsa.qkv.weight[8:16] = 100.0
    assert facts_of(gsa, x).key_entropy == pytest.approx(math.log(2) / math.log(12))


def test_a_single_pixel_is_attended_to_like_all() -> None:
    facts = facts_of(module(map_size=(1, 1)), features()[:, :, :1, :1])
    assert facts.key_entropy == 1


@pytest.mark.parametrize("training", [True, False])
def test_the_network_is_bitwise_as_before(training: bool) -> None:
    model = tiny().train(training)
    model.groups[1].train(not training)  # a part that was frozen stays so
    before = trace(model)
    probe(model, images())
    assert_no_trace(model, before)


@pytest.mark.parametrize("fails_at", [1, 2])
def test_an_error_leaves_no_trace_either(fails_at: int) -> None:
    model, calls = tiny().train(), itertools.count(1)

    def fail(*_: object) -> None:
        if next(calls) == fails_at:
            raise RuntimeError("in the middle")

    model.groups[2].register_forward_hook(fail)
    before = trace(model)
    with pytest.raises(RuntimeError, match="in the middle"):
        probe(model, images())
    assert_no_trace(model, before)


def test_images_of_another_size_are_refused_by_the_model() -> None:
    model = tiny()
    before = trace(model)
    with pytest.raises(ValueError, match="build the model for this image_size"):
        probe(model, images(size=32))
    assert_no_trace(model, before)


def test_hooks_of_others_stay_and_gradients_flow_again() -> None:
    model, calls = tiny(), []
    model.groups.register_forward_hook(lambda *_: calls.append(1))
    probe(model, images())
    calls.clear()
    assert model(images()).requires_grad and calls == [1]


def test_every_attention_module_is_found_by_its_name() -> None:
    model = tiny(placement="gcgg")
    facts = probe(model, images())
    assert list(facts) == ["groups.0.0.spatial", "groups.2.0.spatial.0", "groups.3.0.spatial.0"]
    assert all(isinstance(model.get_submodule(name), GlobalSelfAttention) for name in facts)


def test_a_convolution_network_has_no_facts() -> None:
    assert probe(tiny(placement="none"), images()) == {}
    assert metrics({}) == {}


def test_time_shares_are_parts_of_one() -> None:
    shares = [facts.time_share for facts in probe(tiny(), images()).values()]
    assert min(shares) > 0 and sum(shares) <= 1


def test_time_goes_to_the_module_that_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that moves only inside of one module, and a little at every look."""
    model, clock = tiny(), itertools.count()
    slept = [0.0]
    slow = model.get_submodule("groups.2.0.spatial.0")
    slow.get_submodule("qkv").register_forward_hook(lambda *_: slept.__setitem__(0, slept[0] + 1000))
    monkeypatch.setattr("time.perf_counter", lambda: next(clock) + slept[0])
    shares = {name: facts.time_share for name, facts in probe(model, images()).items()}
    assert shares.pop("groups.2.0.spatial.0") == pytest.approx(1001 / 1009)
    assert list(shares.values()) == pytest.approx([1 / 1009] * 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_every_dtype_and_memory_format_gives_the_same_facts(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = tiny()
    expected = metrics(probe(model.double(), images(dtype=torch.float64)))
    model.to(dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
    got = metrics(probe(model, images(dtype=dtype).to(memory_format=torch.channels_last)))
    for name, value in expected.items():
        if "time_share" not in name:
            assert got[name] == pytest.approx(value, rel=0.1 if dtype == torch.bfloat16 else 1e-4), name


def test_the_callers_autocast_is_probed() -> None:
    torch.manual_seed(0)
    model = tiny()
    expected = metrics(probe(model, images()))
    with torch.autocast("cpu", torch.bfloat16):
        got = metrics(probe(model, images()))
    rms_names = [name for name in expected if "_rms" in name]
    assert [got[name] for name in rms_names] == pytest.approx([expected[name] for name in rms_names], rel=0.1)
    assert any(got[name] != expected[name] for name in rms_names)


def test_a_compiled_network_is_probed_uncompiled() -> None:
    compiled = torch.compile(tiny(), backend="eager")
    assert "_orig_mod.groups.0.0.spatial" in probe(compiled, images())  # type: ignore[arg-type]


def test_metrics_have_names_that_trackers_take() -> None:
    facts = {
        "groups.0.0": ModuleFacts(1.0, 2.0, 0.5, 0.25),
        "a b:é": ModuleFacts(None, 3.0, None, 0.125),
        "": ModuleFacts(4.0, None, 1.0, 0.5),
    }
    got = metrics(facts)
    assert got == {
        "gsa/content_rms/groups.0.0": 1.0,
        "gsa/positional_rms/groups.0.0": 2.0,
        "gsa/key_entropy/groups.0.0": 0.5,
        "gsa/time_share/groups.0.0": 0.25,
        "gsa/positional_rms/a_b__": 3.0,
        "gsa/time_share/a_b__": 0.125,
        "gsa/content_rms": 4.0,
        "gsa/key_entropy": 1.0,
        "gsa/time_share": 0.5,
    }
    assert all(re.fullmatch(r"[a-zA-Z0-9_./-]+", name) for name in got)


@pytest.mark.gpu
def test_a_network_on_a_gpu_is_probed_there() -> None:
    torch.manual_seed(0)
    model = tiny()
    expected = metrics(probe(model, images()))
    got = metrics(probe(model.cuda(), images().cuda()))
    shares = [name for name in got if "time_share" in name]
    assert sum(got.pop(name) for name in shares) <= 1
    assert got == pytest.approx({name: expected[name] for name in got}, rel=0.02)
