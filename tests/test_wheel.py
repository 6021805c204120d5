"""The wheel works away from the checkout: it carries configs and recipes, and trains from another folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SHARED = ("configs", "recipes")
CARRIED = ("README.md", "pyproject.toml", "peftctl", *SHARED)

pytestmark = pytest.mark.slow


def call(*arguments: str | Path, cwd: Path, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run Python elsewhere, with `path` alone before what is installed."""
    found = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    own = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"} | ({"PYTHONPATH": str(path)} if path else {})
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, env=found | own, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that nothing of it lands in the checkout."""
    copy, built = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("dist")
    for name in CARRIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, copy / name)
    call("-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", built, copy, cwd=copy)
    (found,) = built.glob("peftctl-*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("installed")
    call("-m", "pip", "install", "--quiet", "--no-deps", "--target", target, wheel, cwd=target)
    return target


def test_carries_every_config_and_recipe(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    files = [file for name in SHARED for file in (ROOT / name).rglob("*") if file.is_file()]
    assert files
    assert {f"peftctl/_share/{file.relative_to(ROOT).as_posix()}" for file in files} <= names
    assert not [name for name in names if name.startswith("tests/") or name.endswith(".pyc")]


def test_the_command_is_declared(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("entry_points.txt")]
        assert "peftctl = peftctl.cli:main" in archive.read(name).decode()


@pytest.mark.parametrize("options", [(), ("--smoke",)], ids=["as it is", "smoke"])
def test_the_starter_trains_from_another_folder(installed: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    where = call("-c", "import peftctl; print(peftctl.__file__)", cwd=tmp_path, path=installed).stdout
    assert Path(where.strip()).is_relative_to(installed)
    call("-m", "peftctl.cli", "init", "my.yaml", cwd=tmp_path, path=installed)
    call("-m", "peftctl.cli", "train", "my.yaml", *options, cwd=tmp_path, path=installed)
    assert list(tmp_path.glob("runs/*/adapter/adapter_model.safetensors"))


def test_extends_finds_what_ships(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("extends: recipes/smoke.yaml\noutput: runs/mine\n", "utf-8")
    call("-m", "peftctl.cli", "train", "mine.yaml", cwd=tmp_path, path=installed)
    assert (tmp_path / "runs" / "mine" / "adapter").is_dir()
