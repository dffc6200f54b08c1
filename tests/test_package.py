"""The package that is built here, installed outside of the checkout on the oldest and the newest Python, trains an SAE."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PYTHONS = ("3.10", "3.13")
PACKAGES = ("fastsae", "fastsae_kernels")
RUN = (
    "train --dataset chats.jsonl --output run --eval-dialogues 4 --d-sae 64 --tokens 512 --batch-size 64 --buffer-tokens 512 "
    "--forward-tokens 512 --quiet"
).split()

pytestmark = pytest.mark.package


def call(*command: object, cwd: Path) -> str:
    """Runs a program without this checkout on its path; returns what it printed."""
    outside = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "TRITON_INTERPRET")}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=outside, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def find_python(version: str) -> str | None:
    """An interpreter of this version, on the path or among those of pyenv."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"), "versions")
    candidates = [shutil.which(f"python{version}"), *sorted(pyenv.glob(f"{version}.*/bin/python"))]
    for candidate in filter(None, candidates):
        program = [candidate, "-c", "import sys, venv, ensurepip; print('%d.%d' % sys.version_info[:2])"]
        found = subprocess.run(program, capture_output=True, text=True, check=False)
        if found.stdout.strip() == version:
            return str(candidate)
    return None


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The sdist, and the wheel that is built from it, by their suffix."""
    folder = tmp_path_factory.mktemp("build")
    skipped = shutil.ignore_patterns(".*", "*.egg-info", "__pycache__", "build", "dist", "benchmarks", "tests")
    shutil.copytree(ROOT, folder / "source", ignore=skipped)
    call(sys.executable, "-m", "build", "--outdir", folder, folder / "source", cwd=folder)
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return {"sdist": sdist, "wheel": wheel}


def files_of_the_packages() -> set[str]:
    files = (path for package in PACKAGES for path in (ROOT / package).rglob("*") if path.is_file())
    return {str(path.relative_to(ROOT)) for path in files if "__pycache__" not in path.parts}


def test_wheel_and_sdist_hold_the_packages_and_nothing_else(built: dict[str, Path]) -> None:
    with zipfile.ZipFile(built["wheel"]) as wheel:
        names = set(wheel.namelist())
    metadata = {name for name in names if name.split("/")[0].endswith(".dist-info")}
    assert names - metadata == files_of_the_packages()
    assert {name.split("/")[-1] for name in metadata if "/licenses/" in name} == {"LICENSE", "NOTICE"}
    with tarfile.open(built["sdist"]) as sdist:
        sources = {name.partition("/")[2] for name in sdist.getnames()}
    assert files_of_the_packages() | {"LICENSE", "NOTICE", "README.md", "pyproject.toml"} <= sources


def test_a_python_to_install_on_is_here() -> None:
    assert any(map(find_python, PYTHONS)), f"none of Python {' and '.join(PYTHONS)} was found"


@pytest.mark.parametrize(("version", "kind"), [*zip(PYTHONS, ("wheel", "sdist"), strict=True)])
def test_installed_package_trains(version: str, kind: str, built: dict[str, Path], chats: Path, tmp_path: Path) -> None:
    python = find_python(version)
    if python is None:
        pytest.skip(f"there is no Python {version} on this machine")
    call(python, "-m", "venv", tmp_path / "venv", cwd=tmp_path)
    programs = tmp_path / "venv" / "bin"
    package = f"{built[kind]}[train]"
    call(programs / "pip", "install", "--quiet", package, "-c", ROOT / "constraints.txt", cwd=tmp_path)
    shutil.copy(chats, tmp_path / "chats.jsonl")
    where = "import fastsae, fastsae_kernels; print(fastsae.__file__, fastsae_kernels.__file__)"
    assert all(path.startswith(str(tmp_path)) for path in call(programs / "python", "-c", where, cwd=tmp_path).split())
    call(programs / "fastsae", *RUN, cwd=tmp_path)
    assert {"cfg.json", "sae_weights.safetensors", "metrics.json", "report.html"} <= set(os.listdir(tmp_path / "run"))
    call(programs / "fastsae", "evaluate", "run", "--quiet", cwd=tmp_path)
