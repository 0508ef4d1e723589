"""How the benchmarks measure: interleaved rounds, the memory that training keeps, a table of ratios."""

import statistics
import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Case:
    """A network and its input; measured is one training step of it, without the optimizer."""

    name: str
    model: nn.Module
    x: Tensor
    dtype: torch.dtype

    def forward(self) -> Tensor:
        low = self.dtype != torch.float32
        with torch.autocast(self.x.device.type, self.dtype if low else None, enabled=low):
            y: Tensor = self.model(self.x.detach().requires_grad_())
        return y

    def step(self) -> None:
        self.model.zero_grad(set_to_none=True)
        y = self.forward()
        # Any loss would do, but one that lets a last, zero batch norm through.
        y.float().square().mean().backward()  # type: ignore[no-untyped-call]
        if self.x.device.type == "cuda":
            torch.cuda.synchronize()

    def kept_bytes(self) -> int:
        """What a forward pass keeps for the backward pass: every storage once, parameters left out."""
        parameters = {p.untyped_storage().data_ptr() for p in self.model.parameters()}
        kept: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in parameters:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            y = self.forward()  # alive until all is counted: no address comes twice
        del y
        return sum(kept.values())

    def peak_bytes(self) -> int:
        """Most bytes of a CUDA device that a step needs; elsewhere what a forward pass keeps."""
        if self.x.device.type != "cuda":
            return self.kept_bytes()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        self.step()
        return torch.cuda.max_memory_allocated() - before


def seconds_of(cases: list[Case], *, rounds: int) -> dict[str, list[float]]:
    """Seconds of a step of each case, one for every round.

    Each round runs every case once: a machine's speed drifts, so a ratio is taken within a round.
    """
    for case in cases:
        case.step()
        case.step()
    seconds: dict[str, list[float]] = {case.name: [] for case in cases}
    for _ in range(rounds):
        for case in cases:
            start = time.perf_counter()
            case.step()
            seconds[case.name].append(time.perf_counter() - start)
    return seconds


def print_ratios(cases: list[Case], *, rounds: int, images: int) -> None:
    """A line a case: median time, images a second, and how the first case compares with it."""
    seconds = seconds_of(cases, rounds=rounds)
    memory = {case.name: case.peak_bytes() for case in cases}
    first = cases[0].name
    for name, times in seconds.items():
        ratios = [theirs / ours for theirs, ours in zip(times, seconds[first], strict=True)]
        median = statistics.median(times)
        print(
            f"  {name:<28}{median * 1e3:>10.2f} ms{images / median:>10.1f} img/s"
            f"{memory[name] / 2**20:>10.1f} MiB   {first} is {statistics.median(ratios):>5.2f}x as fast "
            f"({min(ratios):.2f}-{max(ratios):.2f}), with {memory[first] / memory[name]:.2f} of its memory",
            flush=True,
        )


def hardware() -> str:
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    return f"CPU with {torch.get_num_threads()} threads, torch {torch.__version__}"


def with_spread(values: list[float], form: str = ".2f") -> str:
    """Median (least-most)."""
    return f"{statistics.median(values):{form}} ({min(values):{form}}-{max(values):{form}})"
