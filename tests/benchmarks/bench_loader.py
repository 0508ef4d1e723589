"""The loader against its peers: images a second, memory, and the first batch.

    python tests/benchmarks/bench_loader.py --photos DIR [--samples 1920] [--rounds 5]

DIR: any folder with JPEGs, of ImageNet's size if the figures shall mean anything. They are repeated under other
keys to --samples and written as shards by `pipeline.shards`. Each loader runs in a process of its own, and each
round runs every loader once: ratios are taken within a round. A worker is a process, or with ours and DALI a
thread. All hand out random resized crops of 224 pixels, mirrored or not, in batches of 64: "uint8" (B, H, W, 3),
or "float32" normalised (B, 3, H, W); ours to device is normalised there, which without CUDA costs CPU time.
Images a core-second: of the time that all threads and processes of a loader spent on any core. MB: the most
that they held at once (RSS: pages that processes share count in each), interpreter and torch included.

Peers that do not import are named and left out. Not compared: ffcv, whose build wants OpenCV's headers, and
MosaicML Streaming, which replaces numpy by an older one.
"""

import argparse
import contextlib
import importlib
import io
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sized
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import torch
import webdataset
from measure import hardware, with_spread
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pipeline.augment import BILINEAR, BOX_DRAWS, Box, random_box, train_crop
from pipeline.config import Config, DataConfig, OptimConfig
from pipeline.data import MEAN, STD, to_device, train_loader
from pipeline.decode import decode, size
from pipeline.manifest import read_manifest, read_sample
from pipeline.order import steps_per_epoch
from pipeline.pictures import ShardsConfig
from pipeline.shards import build

BATCH, SIZE = 64, 224
SCALE = DataConfig().crop_scale
DEFAULT, OURS, BARE = "webdataset + PIL, float32", "ours, uint8", "ours without loading"


# --- the loaders --------------------------------------------------------------------------------------------


def box_of(size: tuple[int, int], rng: np.random.Generator) -> Box:
    return random_box(*size, rng.random(BOX_DRAWS).tolist(), SCALE)


def crop_uint8(image: Image.Image, rng: np.random.Generator) -> NDArray[np.uint8]:
    """By Pillow as torchvision's RandomResizedCrop and RandomHorizontalFlip, which may not import here."""
    left, top, w, h = box_of(image.size, rng)
    image = image.crop((left, top, left + w, top + h)).resize((SIZE, SIZE), BILINEAR)
    return np.array(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else image)


def crop_float32(image: Image.Image, rng: np.random.Generator) -> Tensor:
    """The same, then ToTensor and Normalize."""
    pixels = torch.from_numpy(crop_uint8(image, rng)).permute(2, 0, 1).contiguous().float().div(255)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return pixels.sub(mean).div_(std)  # Normalize copies


class Files(Dataset[Tensor]):
    """A picture a file, as ImageFolder reads them."""

    def __init__(self, folder: Path) -> None:
        self.paths, self.rng = sorted(folder.rglob("*.jpg")), np.random.default_rng(0)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> Tensor:
        with Image.open(self.paths[i]) as image:
            return crop_float32(image.convert("RGB"), self.rng)


def by_torch(data: Any, workers: int, **options: Any) -> Iterator[Tensor]:
    pin = torch.cuda.is_available()  # as ours does
    for batch in DataLoader(data, BATCH, num_workers=workers, pin_memory=pin, **options):
        yield batch[0] if isinstance(batch, list | tuple) else batch


def by_webdataset(work: Path, workers: int, *, crop: Callable[..., Any]) -> Iterator[Tensor]:
    tars = sorted(str(p) for p in (work / "set").glob("train-*.tar"))
    data = webdataset.WebDataset(tars, shardshuffle=100).shuffle(1000).decode("pil").to_tuple("jpg", "cls")
    return by_torch(data.map_tuple(partial(crop, rng=np.random.default_rng(0)), int), workers)


def by_torchvision(work: Path, workers: int) -> Iterator[Tensor]:
    from torchvision import transforms  # type: ignore[import-untyped, unused-ignore]

    crop = transforms.Compose(
        [
            transforms.RandomResizedCrop(SIZE, scale=SCALE),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    return by_webdataset(work, workers, crop=partial(_without_rng, crop))


def _without_rng(crop: Callable[[Image.Image], Tensor], image: Image.Image, rng: object) -> Tensor:
    return crop(image)


def by_files(work: Path, workers: int) -> Iterator[Tensor]:
    return by_torch(Files(work / "photos"), workers, shuffle=True)


def ours(work: Path, workers: int, *, resume: bool = False) -> Iterator[Tensor]:
    samples = read_manifest(work / "set").split("train")
    config = Config(optim=OptimConfig(global_batch=BATCH, micro_batch=BATCH))
    step = steps_per_epoch(len(samples), BATCH) // 2 if resume else 0
    batches = train_loader(
        samples, config, epoch=1, first_step=step, rank=0, world=1, threads=workers, draws=0
    )
    return (batch.images for batch in batches)


def ours_on_device(work: Path, workers: int) -> Iterator[Tensor]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return (to_device(images, device) for images in ours(work, workers))


def ours_without_loading(work: Path, workers: int) -> Iterator[list[Tensor]]:
    """Decode, crop, resize and flip bytes that are there: no reading, no checksum, no order, no batch."""
    samples, rng = read_manifest(work / "set").split("train"), np.random.default_rng(0)
    kept = [read_sample(samples, i) for i in range(0, len(samples), max(1, len(samples) // 480))]

    def picture(i: int) -> Tensor:
        data = kept[i % len(kept)]
        box = box_of(size(data), rng)
        pixels = decode(data, rows=box.top + box.height)
        return train_crop(pixels, box, size=SIZE, mirrored=rng.random() < 0.5)

    with ThreadPoolExecutor(workers) as pool:
        pictures = (pool.map if workers > 1 else map)(picture, range(len(samples)))
        while batch := list(islice(pictures, BATCH)):
            yield batch


def by_timm(work: Path, workers: int) -> Iterator[Tensor]:
    from timm.data import create_dataset, create_loader  # type: ignore[attr-defined, unused-ignore]

    data = create_dataset("", root=str(work / "photos"), is_training=True)
    loader = create_loader(
        data,
        input_size=(3, SIZE, SIZE),
        batch_size=BATCH,
        is_training=True,
        num_workers=workers,
        color_jitter=0.0,
        interpolation="bilinear",
        use_prefetcher=False,
        persistent_workers=False,
    )
    return (images for images, _ in loader)


def by_litdata(work: Path, workers: int) -> Iterator[Tensor]:
    from litdata import StreamingDataLoader, StreamingDataset  # type: ignore[import-not-found]

    transform = partial(crop_encoded, rng=np.random.default_rng(0))
    data = StreamingDataset(str(write_for_litdata(work)), shuffle=True, transform=transform)
    yield from StreamingDataLoader(data, batch_size=BATCH, num_workers=workers)


def crop_encoded(sample: dict[str, Any], rng: np.random.Generator) -> Tensor:
    return crop_float32(Image.open(io.BytesIO(sample["jpg"])).convert("RGB"), rng)


def write_for_litdata(work: Path) -> Path:
    from litdata.streaming.writer import BinaryWriter  # type: ignore[import-not-found]

    folder = work / "litdata"
    if not folder.exists():
        writer = BinaryWriter(str(folder), chunk_bytes="64MB")
        for i, path in enumerate(sorted((work / "photos").rglob("*.jpg"))):
            writer[i] = {"jpg": path.read_bytes(), "cls": i}
        writer.done()
        writer.merge(1)
    return folder


def by_dali(work: Path, workers: int) -> Iterator[Tensor]:
    """On the CPU alone, also where there is a device."""
    from nvidia.dali import fn, pipeline_def, types  # type: ignore[import-not-found]

    paths = sorted(str(p) for p in (work / "set").glob("train-*.tar"))

    @pipeline_def(batch_size=BATCH, num_threads=workers, device_id=None)  # type: ignore[untyped-decorator]
    def pipeline() -> Any:
        data = fn.readers.webdataset(
            paths=paths, ext=["jpg"], random_shuffle=True, initial_fill=1000, name="reader"
        )
        image = fn.decoders.image_random_crop(data, random_area=SCALE, device="cpu")
        image = fn.resize(image, size=(SIZE, SIZE), interp_type=types.INTERP_TRIANGULAR)  # antialiased
        return fn.flip(image, horizontal=fn.random.coin_flip())

    batches = pipeline()
    batches.build()
    for _ in range(batches.epoch_size("reader") // BATCH):
        yield torch.utils.dlpack.from_dlpack(batches.run()[0].as_tensor())


class Loader(NamedTuple):
    make: Callable[[Path, int], Iterator[Sized]]
    needs: str = "torch"  # a module


LOADERS = {
    DEFAULT: Loader(partial(by_webdataset, crop=crop_float32)),
    "webdataset + torchvision": Loader(by_torchvision, "torchvision.transforms"),
    "webdataset + PIL, uint8": Loader(partial(by_webdataset, crop=crop_uint8)),
    "files + PIL, float32": Loader(by_files),
    "timm, files, float32": Loader(by_timm, "timm"),
    "litdata + PIL, float32": Loader(by_litdata, "litdata"),
    "DALI, tars, uint8": Loader(by_dali, "nvidia.dali"),
    OURS: Loader(ours),
    "ours to device, float32": Loader(ours_on_device),
    BARE: Loader(ours_without_loading),
}
RESUMED = {"ours, from mid-epoch": Loader(partial(ours, resume=True))}  # its first batch alone is of interest


def here(loaders: dict[str, Loader]) -> list[str]:
    """Those whose module imports; the others are named."""
    found = []
    for name, loader in loaders.items():
        try:
            importlib.import_module(loader.needs)
        except (ImportError, RuntimeError) as error:  # RuntimeError: torchvision beside another torch
            print(f"LEFT OUT: {name}: {error}", flush=True)
        else:
            found.append(name)
    return found


# --- speed, memory, first batches ---------------------------------------------------------------------------


class Reading(NamedTuple):
    speed: float  # images a second, after the first batch
    per_core: float  # images a second of a core


def processes(pid: int) -> list[psutil.Process]:
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]


def core_seconds() -> float:
    return sum(sum(p.cpu_times()[:4]) for p in processes(os.getpid()))  # its own and its dead children's


def rss(pid: int) -> float:
    """MB of a process and its children."""
    total = 0
    for process in processes(pid):
        with contextlib.suppress(psutil.NoSuchProcess):
            total += process.memory_info().rss
    return total / 1e6


def apart(function: Callable[..., Any], *args: object) -> tuple[Any, float]:
    """What a function returns in a process of its own, and the most MB held meanwhile."""
    spawn, peak = multiprocessing.get_context("spawn"), 0.0
    near, far = spawn.Pipe()
    child = spawn.Process(target=_send, args=(far, function, *args))
    child.start()
    far.close()
    while not near.poll(0.05):
        peak = max(peak, rss(child.pid or 0))
    found = near.recv()  # EOFError: it has failed, and said why
    child.join()
    return found, peak


def _send(pipe: Connection, function: Callable[..., Any], *args: object) -> None:
    # As in a program of the user's: the child of a spawn would spawn its own children too.
    multiprocessing.set_start_method("fork", force=True)
    pipe.send(function(*args))


def epoch_of(name: str, work: Path, workers: int) -> Reading:
    _, batches = _opened(name, work, workers)
    next(batches)
    start, used = time.perf_counter(), core_seconds()
    images = sum(len(batch) for batch in batches)
    return Reading(images / (time.perf_counter() - start), images / (core_seconds() - used))


def first_batch_of(name: str, work: Path, workers: int) -> float:
    start, batches = _opened(name, work, workers)
    next(batches)
    return time.perf_counter() - start


def _opened(name: str, work: Path, workers: int) -> tuple[float, Iterator[Sized]]:
    torch.set_num_threads(1)
    loader = {**LOADERS, **RESUMED}[name]
    importlib.import_module(loader.needs)
    return time.perf_counter(), loader.make(work, workers)


def prepare(photos: Path, work: Path, *, samples: int) -> None:
    """`samples` links to the photos in ten classes, and our shards of these."""
    found = sorted(p for p in photos.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg"))
    if not found:
        raise SystemExit(f"--photos {photos}: no .jpg or .jpeg there")
    for i in range(samples):
        path = found[i % len(found)].resolve()
        link = work / "photos" / f"class{i % 10}" / f"{i:06d}.jpg"
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path)
    start = time.perf_counter()
    settings = ShardsConfig(
        name="set", source="folder", input=str(work / "photos"), val_fraction=0.01, samples_per_shard=160
    )
    read = build(settings, work / "set").manifest.split("train")
    print(
        f"{len(found)} photos, {len(read)} train samples of {read.size.mean() / 1e3:.0f} kB, "
        f"built in {time.perf_counter() - start:.1f} s"
    )


def speed(names: list[str], work: Path, *, rounds: int) -> None:
    for workers in (1, 2):
        print(f"speed: {workers} worker(s), n = {rounds} rounds: median (least-most)")
        found: dict[str, list[Reading]] = {name: [] for name in names}
        peaks: dict[str, list[float]] = {name: [] for name in found}
        for _ in range(rounds):
            for name in found:
                reading, peak = apart(epoch_of, name, work, workers)
                found[name].append(reading)
                peaks[name].append(peak)
        print(f"  {'':<26}{'images/s':<20}{'images/core-s':<20}{'of the first':<20}{'per core':<20}MB")
        for name, readings in found.items():
            print(
                f"  {name:<26}{with_spread([r.speed for r in readings], '.0f'):<20}"
                f"{with_spread([r.per_core for r in readings], '.0f'):<20}"
                f"{with_spread(ratios(found, name, DEFAULT, 'speed')):<20}"
                f"{with_spread(ratios(found, name, DEFAULT, 'per_core')):<20}{statistics.median(peaks[name]):.0f}"
            )
        kept = (with_spread(ratios(found, OURS, BARE, key)) for key in ("speed", "per_core"))
        print(f"  {OURS} keeps of {BARE}: {' images/s, '.join(kept)} images/core-s", flush=True)


def ratios(found: dict[str, list[Reading]], name: str, base: str, key: str) -> list[float]:
    return [getattr(a, key) / getattr(b, key) for a, b in zip(found[name], found[base], strict=True)]


def first_batches(names: list[str], work: Path, *, rounds: int) -> None:
    print(f"first batch of {BATCH}: seconds, 1 worker, n = {rounds}: median (least-most)")
    found: dict[str, list[float]] = {name: [] for name in names if name != BARE}
    for _ in range(rounds):
        for name in found:
            found[name].append(apart(first_batch_of, name, work, 1)[0])
    for name, seconds in found.items():
        print(f"  {name:<26}{with_spread(seconds)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--photos", type=Path, required=True, help="a folder with JPEGs, at any depth")
    parser.add_argument("--samples", type=int, default=1920)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    print(f"{hardware()}, {os.cpu_count()} cores")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        prepare(options.photos, work, samples=options.samples)
        names = here(LOADERS)
        speed(names, work, rounds=options.rounds)
        first_batches([*names, *RESUMED], work, rounds=options.rounds)


if __name__ == "__main__":
    main()
