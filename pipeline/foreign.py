"""Index foreign shards: the manifest of WebDataset .tar files that others wrote; the files stay where they are."""

import glob
import os
import re
import shutil
import stat
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from multiprocessing import active_children, get_context, parent_process
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import pyarrow as pa
from pydantic import Field

from pipeline.config import InputError, Name, Section, digest
from pipeline.manifest import (
    MANIFEST,
    MAX_NAMED,
    SCHEMA,
    SPLITS,
    Manifest,
    Progress,
    Shard,
    ShardError,
    named,
    read_manifest,
    write_manifest,
)
from pipeline.remote import SCHEMES, Unreachable, is_url, shown
from pipeline.rundir import hold, sync
from pipeline.scan import MAX_CLASSES, UNPRINTABLE, Sample, Scan, left_out, scan

MAX_BROKEN = 0.01  # share of the samples; above it the set is not what was meant
MAX_FAULTS = 20  # damaged tars, before the rest is not looked at
SHARDS_A_PROCESS = 8  # whose headers are read in the time that a process needs to start

SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")
BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}")


class IndexConfig(Section):
    """Which foreign tars make a set, and where their labels are."""

    name: Name
    train: Annotated[list[str], Field(min_length=1)]  # paths, folders, patterns, URLs
    val: list[str] = []
    label_field: str | None = None  # of the .json member; without: the .cls member
    classes: str | None = None  # a file, a name a line
    checksums: bool = False  # remote tars have them anyway: all their bytes pass by


class _Tar(NamedTuple):
    """What was found in a tar: `columns` are the manifest's, those that the bytes tell."""

    split: str
    place: str
    scan: Scan  # without its samples, which stand in the next two
    labels: list[int | str]
    columns: dict[str, pa.Array]


def index(
    config: IndexConfig, folder: Path, *, progress: Progress | None = None, replace: bool = False
) -> Manifest:
    """Write the manifest of foreign tars into `folder`: whole or not at all. `progress` counts tars.

    A sample without exactly one picture and one label is left out and listed in `broken`, as is any link.
    Raises InputError: no such tar, a damaged one, more than 1 % broken samples, labels that are no classes,
    `folder` in use and not to be replaced.
    """
    folder = folder.resolve()
    _check_free(folder, replace=replace)
    classes = _read_classes(Path(config.classes)) if config.classes else None
    tars = _scan_all(config, _places(config), progress or (lambda done, total: None))
    names = classes or _classes(tars)
    shards, rows, broken = _assemble(tars, names)
    content = [[tar.place, tar.scan.bytes, tar.scan.sha256] for tar in tars]
    values = {
        "classes": names,
        "shards": shards,
        "made": {
            "settings": _settings(config),
            "input_digest": digest(content),
        },
        "broken": broken,
        "ignored": sum(tar.scan.ignored for tar in tars),
    }
    try:
        with hold(folder.with_name(f".{folder.name}.lock"), str(folder)):
            _check_free(folder, replace=replace)
            return _write(folder, rows, values)
    except OSError as error:
        raise InputError(
            f"{folder}: cannot be written: {error.strerror or error}; "
            "next: make room there, or choose another --out"
        ) from None


def unchanged(config: IndexConfig, folder: Path) -> Manifest | None:
    """The manifest in `folder`, if the same options made it of the same tars: by name and, here, size and time."""
    path = folder / MANIFEST
    if not path.is_file() or [p.name for p in folder.iterdir()] != [MANIFEST]:
        return None
    manifest = read_manifest(folder)
    known = {shard.path: shard for shard in manifest.shards}
    content = []
    for _, place in _places(config):
        size, sha256 = (known[place].bytes, known[place].sha256) if place in known else (0, "")
        if not is_url(place):
            found = os.stat(place)
            size = found.st_size if found.st_mtime_ns <= path.stat().st_mtime_ns else -1
        content.append([place, size, sha256])
    made = {"settings": _settings(config), "input_digest": digest(content)}
    names = _read_classes(Path(config.classes)) if config.classes else list(manifest.classes)
    return manifest if manifest.made == made and tuple(names) == manifest.classes else None


def _settings(config: IndexConfig) -> dict[str, Any]:
    return {"source": "index", **config.model_dump(mode="json")}


def _check_free(folder: Path, *, replace: bool) -> None:
    """Raises InputError unless `folder` is new, empty, or only a manifest that may be replaced."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: expected a folder, found a file; next: choose another name")
    names = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
    others = [n for n in names if n != MANIFEST]
    if others:  # shards that were built, perhaps: an index never deletes any
        raise InputError(f"{folder}: {others[0]!r} is in it; next: move it away, or choose another name")
    if names and not replace:
        raise InputError(
            f"{folder}: exists already, made otherwise or of tars that have changed since; "
            "next: choose another name, or replace it (--replace)"
        )


def _write(folder: Path, rows: pa.Table, values: dict[str, Any]) -> Manifest:
    """Write, read back, rename; the caller holds the lock."""
    part = folder.with_name(f".{folder.name}.indexing")
    shutil.rmtree(part, ignore_errors=True)  # of a killed index
    try:
        part.mkdir(parents=True)
        write_manifest(part, rows, **values)
        read_manifest(part)
        folder.mkdir(exist_ok=True)
        os.replace(part / MANIFEST, folder / MANIFEST)
        sync(folder)
        sync(folder.parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return read_manifest(folder)


# --- which tars --------------------------------------------------------------------------------------------


def _places(config: IndexConfig) -> list[tuple[str, str]]:
    """(split, absolute path or URL) of each tar, in the order of the options; of a glob, by name."""
    found = [
        (split, place) for split in SPLITS for pattern in getattr(config, split) for place in _expand(pattern)
    ]
    counts = Counter(shown(place) if is_url(place) else os.path.realpath(place) for _, place in found)
    twice = [place for place, count in counts.items() if count > 1]
    if twice:
        raise InputError(f"named twice: {named(twice)}; next: give each tar once, for train or for val")
    return found


def local_tars(pattern: str) -> list[str]:
    """The absolute paths of the tars that a pattern names on this machine. InputError: none, or elsewhere."""
    found = _expand(pattern)
    if is_url(found[0]):
        raise InputError(f"{shown(found[0])}: expected a path; next: make a manifest with `gsa shards index`")
    return found


def _expand(pattern: str) -> list[str]:
    if "://" in pattern and re.search(r"://[^/]*@|\?", pattern):
        bare = re.sub(r"://[^/]*@", "://", pattern.partition("?")[0])
        raise InputError(
            f"{bare!r}: expected a URL without user, password or query (?...): the manifest, which people share, "
            "would keep them, and what is signed expires; next: the URL alone, its credentials in ~/.netrc, or "
            "in the environment or fsspec's own configuration, as the service has it"
        )
    if UNPRINTABLE.search(pattern):
        raise InputError(f"{pattern!r}: a name that cannot be printed; next: rename it")
    scheme = SCHEME.match(pattern)
    if "::" in pattern:
        raise InputError(f"{pattern!r}: chains of file systems (::) are not read; next: name the tar itself")
    if scheme:
        return _expand_url(pattern, scheme[1])
    if os.path.isdir(pattern):
        found = sorted(glob.glob(os.path.join(glob.escape(pattern), "*.tar")))
    elif os.path.lexists(pattern):  # whatever signs are in its name
        found = [pattern]
    else:
        found = [path for text in _unbraced(pattern) for path in _glob(text)]
    missing = [repr(path) for path in found if not os.path.exists(path)]
    if missing or not found:
        raise InputError(
            f"{pattern!r}: {f'not there: {named(missing)}' if missing else 'no .tar file matches'}; "
            "next: give paths, folders, globs, train-{000000..001023}.tar, or URLs"
        )
    odd = [
        repr(path) for path in found if not stat.S_ISREG(os.stat(path).st_mode) or UNPRINTABLE.search(path)
    ]
    if odd:
        raise InputError(f"{pattern!r}: no regular files, or not with printable names: {named(odd)}")
    return [os.path.abspath(path) for path in found]


def _expand_url(pattern: str, scheme: str) -> list[str]:
    if scheme not in SCHEMES or not is_url(pattern):
        raise InputError(
            f"{pattern!r}: {scheme}: is not read; expected a path (./{pattern} if it is one), "
            f"or a URL of {', '.join(SCHEMES)}"
        )
    if "*" in shown(pattern):
        raise InputError(f"{shown(pattern)}: a URL has no globs; next: write a range: {{000000..001023}}")
    return _unbraced(pattern)


def _unbraced(pattern: str) -> list[str]:
    """`a-{08..10}.tar` -> a-08.tar, a-09.tar, a-10.tar; `{a,b}.tar` -> a.tar, b.tar."""
    braces = BRACES.search(pattern)
    if not braces:
        return [pattern]
    first, last, words = braces.groups()
    if first and not 0 <= int(last) - int(first) < MAX_CLASSES:
        raise InputError(f"{braces[0]}: expected a range that rises, of fewer than {MAX_CLASSES}")
    width = len(first or "")
    texts = words.split(",") if words else [f"{n:0{width}d}" for n in range(int(first), int(last) + 1)]
    before, after = pattern[: braces.start()], _unbraced(pattern[braces.end() :])
    return [f"{before}{text}{rest}" for text in texts for rest in after]


def _glob(text: str) -> list[str]:
    return sorted(glob.glob(text, recursive=True)) if glob.has_magic(text) else [text]


def _read_classes(path: Path) -> list[str]:
    try:
        names = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--classes {path}: cannot be read: {error}") from None
    twice = [repr(name) for name, count in Counter(names).items() if count > 1]
    odd = [repr(name) for name in names if not name.strip() or UNPRINTABLE.search(name)]
    if twice or odd or len(names) < 2:
        raise InputError(
            f"--classes {path}: expected at least 2 names, each its own line, once; "
            f"got {len(names)}{f', twice: {named(twice)}' if twice else ''}{f', odd: {named(odd)}' if odd else ''}"
        )
    return names


# --- many tars ---------------------------------------------------------------------------------------------


def _scan_all(config: IndexConfig, places: list[tuple[str, str]], progress: Progress) -> list[_Tar]:
    """What is in each tar, in order. Raises ShardError that names the damaged ones."""
    checksums = config.checksums or any(is_url(place) for _, place in places)
    read = partial(scan, label_field=config.label_field, checksums=checksums)
    tars: list[_Tar] = []
    faults: list[str] = []
    with _map(_processes(len(places), checksums=checksums)) as mapped:
        try:
            for (split, place), found in zip(places, mapped(read, [p for _, p in places]), strict=False):
                tars.append(_tar(split, place, found))
                faults += [found.fault] if found.fault else []
                progress(len(tars), len(places))
                if len(faults) == MAX_FAULTS:
                    break
        except Unreachable as error:  # the other tars there would take as long
            raise InputError(str(error)) from None
    if faults:
        raise ShardError(
            f"{len(faults)} of {len(tars)} tars cannot be indexed: {_joined(faults)}; "
            "next: get them again, or leave them out"
        )
    return tars


def _tar(split: str, place: str, found: Scan) -> _Tar:
    """In columns: 1.28 million samples would take 0.5 GB as objects."""
    values = zip(*found.samples, strict=True) if found.samples else ((),) * len(Sample._fields)
    columns = dict(zip(Sample._fields, values, strict=True))
    labels = list(columns.pop("label"))
    arrays = {name: pa.array(column, SCHEMA.field(name).type) for name, column in columns.items()}
    return _Tar(split, place, found._replace(samples=[]), labels, arrays)


def _joined(lines: Sequence[str]) -> str:
    more = len(lines) - MAX_NAMED
    return "; ".join(lines[:MAX_NAMED]) + (f"; and {more} more" if more > 0 else "")


def _processes(tars: int, *, checksums: bool) -> int:
    return min(len(os.sched_getaffinity(0)), tars if checksums else tars // SHARDS_A_PROCESS)


@contextmanager
def _map(processes: int) -> Iterator[Any]:
    """A map() that keeps the order; over processes, because tarfile holds the GIL, where that pays."""
    if processes < 2:
        yield map
        return
    before = set(active_children())
    # spawn: this process may have threads, which fork would leave behind
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn"), initializer=_follow) as pool:
        try:
            yield pool.map
        except BaseException:
            for child in set(active_children()) - before:
                child.terminate()  # the pool would wait until its tars are read
            raise
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _follow() -> None:
    """End with the process that started this one, even if it was killed."""
    parent = parent_process()
    assert parent, "started by a pool"

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


# --- the set -----------------------------------------------------------------------------------------------


def _classes(tars: list[_Tar]) -> list[str]:
    """Of names, the sorted names; of numbers, all up to the highest."""
    labels = {label for tar in tars for label in tar.labels}
    names = sorted(label for label in labels if isinstance(label, str))
    numbers = sorted(label for label in labels if isinstance(label, int))
    if names and numbers:
        raise InputError(
            f"expected class names or class numbers, got both: {named([repr(n) for n in names])} and "
            f"{named([str(n) for n in numbers])}; next: --classes FILE, if they mean the same classes"
        )
    classes = names or [str(n) for n in range(numbers[-1] + 1 if numbers else 0)]
    if labels and len(classes) < 2:
        raise InputError(f"expected at least 2 classes, got {len(classes)}: {classes[0]!r}")
    return classes


def _assemble(tars: list[_Tar], classes: list[str]) -> tuple[list[Shard], pa.Table, list[dict[str, str]]]:
    """Shards, rows and what is left out. Raises InputError if that is more than 1 %."""
    numbers = {name: number for number, name in enumerate(classes)}
    shards, tables, broken = [], [SCHEMA.empty_table()], []
    strange: list[int | str] = []
    for tar, name in zip(tars, _names([tar.place for tar in tars]), strict=True):
        labels = [numbers.get(label, -1) if isinstance(label, str) else label for label in tar.labels]
        good = np.array([0 <= label < len(classes) for label in labels], bool)
        broken += tar.scan.broken
        for row in np.flatnonzero(~good).tolist():
            strange.append(tar.labels[row])
            reason = f"label {tar.labels[row]!r} is none of the {len(classes)} classes"
            broken.append(left_out(tar.place, str(tar.columns["key"][row]), reason))
        count = int(good.sum())
        if count:
            shards.append(Shard(name, tar.split, tar.scan.sha256, tar.scan.bytes, count, tar.place))
            tables.append(_table(tar, name, labels).filter(pa.array(good)))
    rows = pa.concat_tables(tables).unify_dictionaries()
    _check_labels(strange, len(strange) + len(rows), classes)
    _check_broken(broken, len(rows))
    return shards, rows, broken


def _check_labels(strange: list[int | str], total: int, classes: list[str]) -> None:
    """Where many labels have no class, the file of classes is not that of these tars."""
    if len(strange) > MAX_BROKEN * total:
        labels = sorted(set(strange), key=lambda label: (isinstance(label, str), label))
        last = len(classes) - 1
        raise InputError(
            f"--classes: expected a name for every label, got {len(classes)} names (for labels 0..{last}); "
            f"{len(strange)} of {total} samples have others: {named([repr(label) for label in labels])}; "
            "next: a file with a line for each class, in the labels' order"
        )


def _check_broken(broken: list[dict[str, str]], good: int) -> None:
    total = len(broken) + good
    if len(broken) > MAX_BROKEN * total:
        lines = [f"{row['file']}: {row['reason']}" for row in broken]
        raise InputError(
            f"{len(broken)} of {total} samples are broken, above {MAX_BROKEN:.0%}: {_joined(lines)}; next: mend "
            "or leave out their tars; if the label is a field of the .json member, name it (--label-field)"
        )


def _names(places: list[str]) -> list[str]:
    """The file's name of each, if that tells them apart, else all of the place."""
    short = [os.path.basename(shown(place)) for place in places]
    return short if len(set(short)) == len(short) else [shown(place) for place in places]


def _table(tar: _Tar, name: str, labels: list[int]) -> pa.Table:
    same = pa.array(np.zeros(len(labels), np.int32))
    columns = {
        **tar.columns,
        "label": pa.array(labels, pa.int32()),
        "split": pa.DictionaryArray.from_arrays(same, [tar.split]),
        "shard": pa.DictionaryArray.from_arrays(same, [name]),
    }
    return pa.table([columns[field] for field in SCHEMA.names], schema=SCHEMA)
