"""The house rules: imports flow one way, a third-party library has owners, heavy imports wait for a verb."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("gsa_models", "pipeline", "cluster")
ALLOWED = {  # package -> our packages that it may import
    "gsa_models": {"gsa_models"},
    "pipeline": {"pipeline", "gsa_models"},
    "cluster": {"cluster", "pipeline", "gsa_models"},
}
OWNERS = {  # library -> the only modules that may import it
    "webdataset": {"pipeline.shards", "pipeline.stream"},
    "pyarrow": {
        "pipeline.shards",
        "pipeline.manifest",
        "pipeline.mapped",
        "pipeline.foreign",
        "pipeline.order",
        "pipeline.tables",
    },
    "mlflow": {"pipeline.tracking", "pipeline.shipper", "pipeline.registry"},
    "ray": {"pipeline.ray_session", "pipeline.ray_train", "pipeline.tune", "cluster.ray_cluster"},
    "submitit": {"cluster.submit", "cluster.status", "cluster.job"},
    "yaml": {"pipeline.config"},
    "sklearn": {"pipeline.pictures"},
    "scipy": {"pipeline.archives", "pipeline.study"},
    "matplotlib": {"pipeline.plots"},
    "optuna": {"pipeline.plots", "pipeline.samplers"},
    "pytorch_optimizer": {"pipeline.optim"},
    "fsspec": {"pipeline.remote"},
    "aiohttp": {"pipeline.remote"},
}
VERBS = ("models", "train", "tune", "report", "evaluate", "register", "predict", "ui", "run", "doctor")
HEAVY = ("torch", "ray", "mlflow", "pyarrow", "pandas", "sklearn", "webdataset", "numpy", "fsspec", "aiohttp")


def modules() -> dict[str, Path]:
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


def imported(path: Path) -> set[str]:
    """Every module that a file names in an import statement, at the top or inside of functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


@pytest.mark.parametrize("module", modules())
def test_imports_flow_one_way(module: str) -> None:
    package = module.split(".")[0]
    ours = {name.split(".")[0] for name in imported(modules()[module])} & set(PACKAGES)
    assert ours <= ALLOWED[package], f"{module} imports {ours - ALLOWED[package]}"


@pytest.mark.parametrize("library", OWNERS)
def test_a_library_is_imported_by_its_owners_only(library: str) -> None:
    users = {m for m, path in modules().items() if library in {n.split(".")[0] for n in imported(path)}}
    assert users <= OWNERS[library], f"{users - OWNERS[library]} import {library}"


def test_the_networks_need_torch_alone() -> None:
    allowed = {"torch", "gsa_models", *sys.stdlib_module_names}
    for module, path in modules().items():
        if module.startswith("gsa_models"):
            # CUDA builds of torch bring triton along; the operator imports these files on CUDA alone.
            also = {"triton"} if module.endswith("_triton") else set()
            assert {name.split(".")[0] for name in imported(path)} <= allowed | also, module


def test_training_runs_without_ray_and_mlflow() -> None:
    code = (
        "import sys; sys.modules.update(ray=None, mlflow=None); import pipeline.train;"
        "assert not {'pipeline.ray_train', 'pipeline.tracking'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    "command",
    [
        [],
        ["shards"],
        ["shards", "index"],
        *([verb] for verb in VERBS),
    ],
    ids=" ".join,
)
def test_help_imports_nothing_heavy(command: list[str]) -> None:
    code = (
        "import sys, pipeline.cli as cli\n"
        f"sys.argv = ['gsa', *{command}, '--help']\n"
        "try: cli.main()\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        f"assert not (heavy := set({HEAVY}) & set(sys.modules)), heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Usage: gsa" in done.stdout


def test_no_unsafe_call_is_in_the_code() -> None:
    """Nothing unpickles, evaluates or hands text to a shell."""
    unsafe = ("weights_only=False", "pickle.load", "yaml.load(text)", "shell=True", "os.system", "eval(")
    for module, path in modules().items():
        text = path.read_text().replace(".eval(", "")
        assert not [word for word in unsafe if word in text], module
