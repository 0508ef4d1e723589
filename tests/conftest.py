"""What tests share: little pictures, shards made of them, a run's settings; and what was not tested here."""

import multiprocessing
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

HOME = pytest.StashKey[str]()
ELSEWHERE = (
    "GSA_CACHE",
    "GSA_CACHE_GB",
    "GSA_OUT",
    "MLFLOW_TRACKING_URI",
    "RAY_ADDRESS",
    "XDG_CACHE_HOME",
    "XDG_CONFIG_HOME",
)
GPU = "no CUDA device (marker gpu): run on a machine that has one"
SLURM = "no Slurm (marker slurm): run on a login node, where `sinfo` is found"
PHOTOS = "GSA_PHOTOS is not set: name a folder of photographs, a class per sub-folder"
SLOW = "slow: run `make soak`"


# --- where tests may write, and what they need -------------------------------------------------------------


def pytest_configure(config: pytest.Config) -> None:
    """A home of our own and nothing of the user's settings: no test writes outside of temporary folders."""
    config.stash[HOME] = tempfile.mkdtemp(prefix="gsa-tests-home-")
    os.environ["HOME"] = config.stash[HOME]
    os.environ["HYPOTHESIS_STORAGE_DIRECTORY"] = os.path.join(config.stash[HOME], "hypothesis")
    hypothesis.settings.register_profile("shared", deadline=None)  # the machine may be busy
    hypothesis.settings.load_profile("shared")
    os.environ["OMP_NUM_THREADS"] = "1"  # little tensors: more threads only wait for one another
    for name in ELSEWHERE:
        os.environ.pop(name, None)


def pytest_unconfigure(config: pytest.Config) -> None:
    shutil.rmtree(config.stash[HOME], ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    slurm = [item for item in items if item.get_closest_marker("slurm")]
    for item in gpu if gpu and not _has_gpu() else []:
        item.add_marker(pytest.mark.skip(reason=GPU))
    for item in slurm if not shutil.which("sinfo") else []:
        item.add_marker(pytest.mark.skip(reason=SLURM))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say loudly what this machine could not test: a green line must not be read as more than it is."""
    stats = terminalreporter.stats
    missing = Counter(_reason(report) for report in stats.get("skipped", ()))
    missing[SLOW] = sum(item.get_closest_marker("slow") is not None for item in stats.get("deselected", ()))
    for reason, count in (+missing).items():
        line = f"!!! NOT TESTED HERE: {count} {'test' if count == 1 else 'tests'}: {reason}"
        terminalreporter.write_line(line, yellow=True, bold=True)


def _reason(report: Any) -> str:
    text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    if "GSA_PHOTOS" in text and "GSA_PHOTOS" not in os.environ:
        return PHOTOS
    return text.removeprefix("Skipped: ")


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


# --- little real things ------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of pictures: the digits 0, 1, 2 in a sub-folder each, 24 PNGs of 32x32 pixels in each."""
    from PIL import Image
    from sklearn.datasets import load_digits

    root = tmp_path_factory.mktemp("pictures")
    scans, labels = load_digits(n_class=3, return_X_y=True)
    for digit in range(3):
        (root / str(digit)).mkdir()
        for i, scan in enumerate(scans[labels == digit][:24]):
            small = Image.fromarray((scan.reshape(8, 8) * (255 / 16)).round().astype("uint8"))
            small.resize((32, 32), Image.Resampling.BICUBIC).save(root / str(digit) / f"{i:02d}.png")
    return root


@pytest.fixture(scope="session")
def mini(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of the pictures: 54 to train on, 18 to test. Not to be changed: copy them first."""
    from pipeline.pictures import ShardsConfig
    from pipeline.shards import build

    folder = tmp_path_factory.mktemp("shards") / "mini"
    config = ShardsConfig(name="mini", source="folder", input=str(pictures), val_fraction=0.25)
    build(config, folder)
    return folder


@pytest.fixture
def out(mini: Path, tmp_path: Path) -> Any:
    """An output root with the shards `mini` in it."""
    from pipeline.rundir import Out

    root = tmp_path / "out"
    (root / "shards").mkdir(parents=True)
    (root / "shards" / "mini").symlink_to(mini)
    return Out(root)


@pytest.fixture(scope="session")
def mini_config() -> Callable[..., Any]:
    """mini_config(**changes): settings that train in seconds on `mini`.

    A change is a field by its name (epochs=4), or with its section where two have that name
    (**{"optim.name": "adamw"}).
    """
    from pipeline.config import Config, flat, validate

    fields: dict[str, str] = {name.rpartition(".")[2]: name for name in flat(Config())}

    def make(**changes: Any) -> Config:
        values: dict[str, Any] = {
            "model": {"name": "gsa_resnet_tiny", "stem": "imagenet", "heads": 4},
            "data": {"shards": "mini", "image_size": 32, "crop_pct": 1.0},
            "optim": {"lr": 0.1, "epochs": 2, "warmup_epochs": 0.5, "global_batch": 16, "micro_batch": 4},
        }
        for change, value in changes.items():
            section, _, field = (change if "." in change else fields.get(change, change)).rpartition(".")
            (values.setdefault(section, {}) if section else values)[field] = value
        return validate(Config, values, where="mini_config")

    return make


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For little sums: a second thread only waits, long where the machine is shared."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# --- processes of our own ----------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def forks() -> Any:
    """A process that has imported torch, and what it imports later, and forks a new one for each rank."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["pytest", "pipeline.train", "torch._dynamo", "pandas", "PIL.PngImagePlugin"]
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("GLOO_SOCKET_IFNAME", "lo")
        warm = context.Process(target=len, args=((),))
        warm.start()
        warm.join()
    return context


@pytest.fixture(scope="session")
def ray() -> Iterator[None]:
    """One Ray for all tests that do not break it."""
    from pipeline.ray_session import session

    with session(cpus=5):
        yield


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """32 little JPEGs, PNGs and WebPs of 12x9 pixels in the sub-folders ant, bee, cat. Not to be changed."""
    from photos import write_photos

    return write_photos(tmp_path_factory.mktemp("photos"), {"ant": 10, "bee": 15, "cat": 7})


@pytest.fixture(scope="session")
def built(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of `photos`: 26 train samples, 6 val, 8 in a shard. Not to be changed."""
    from photos import settings

    from pipeline.shards import build

    folder = tmp_path_factory.mktemp("built") / "set"
    build(settings(photos), folder)
    return folder


@pytest.fixture
def own(built: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return shutil.copytree(built, tmp_path / "own")


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The manifest of the digits as shards, 8x8 pixels."""
    from pipeline.pictures import ShardsConfig
    from pipeline.shards import build

    config = ShardsConfig(name="digits", source="digits", image_size=8)
    return build(config, tmp_path_factory.mktemp("digits") / "digits").manifest
