"""What a user installs: the wheel and what is in it, the shipped run files, light imports, and `rayft doctor`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from rayft import doctor

ROOT = Path(__file__).resolve().parents[1]
OWN_ENVS = str(Path(doctor.__file__).resolve().parents[1] / "envs")
SOURCES = ["pyproject.toml", "setup.py", "README.md", "LICENSE", "rayft", "envs", "tune_configs"]


def python(code: str, cwd: Path, *, path: str = "") -> str:
    """Standard output of a fresh interpreter in ``cwd``, with ``path`` in front of the installed packages."""
    environment = os.environ | {"PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-P", "-c", code], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(
    "module",
    ["rayft", "rayft.doctor", "rayft.cli", "rayft.reward", "rayft.score", "envs.toy", "envs.toy.reward"],
)
def test_a_light_module_brings_neither_torch_nor_ray(module, tmp_path):
    loaded = python(f"import sys, {module}; print(*(m for m in ('torch', 'ray') if m in sys.modules))", tmp_path)
    assert loaded == ""


def test_the_shipped_run_files_are_found_from_any_folder(tmp_path):
    code = "from importlib.resources import files; print(*(f.name for f in files('rayft.configs').iterdir()))"
    found = set(python(code, tmp_path).split())
    assert {path.name for path in (ROOT / "tune_configs").glob("*.yaml")} <= found
    assert "toy_ppo.yaml" in found


def test_every_entry_point_leads_to_its_object():
    from importlib.metadata import distribution

    points = distribution("rayft").entry_points
    assert {"toy", "toy_masked"} <= {point.name for point in points if point.group == "rayft.domains"}
    for point in points:
        assert callable(point.load()), point


def test_doctor_finds_nothing_broken_where_the_tests_run(capsys):
    found = {check.name: check for check in doctor.checks()}
    assert doctor.render(found.values()) == 0, [check for check in found.values() if check.ok is False]
    printed = capsys.readouterr().out
    for name in ("Python", "torch", "ray ", "gymnasium ==1.2.2", "envs", "rdkit", "open3d", "Ray's token", "data"):
        assert name in printed
    assert all(check.remedy for check in found.values() if check.ok is None)


@pytest.mark.parametrize("regular", [True, False], ids=["a package", "a plain folder"])
@pytest.mark.parametrize("where", ["working directory", "PYTHONPATH"])
def test_doctor_names_the_folder_that_hides_rayfts_envs(where, regular, tmp_path):
    foreign, start = tmp_path / "foreign" / "envs", tmp_path / "start"
    foreign.mkdir(parents=True)
    start.mkdir()
    if regular:
        (foreign / "__init__.py").touch()
    inside = where == "working directory"
    code = "from rayft import doctor; print(doctor.envs_folder()); print(doctor._envs())"
    found, check = python(
        code, foreign.parent if inside else start, path="" if inside else str(foreign.parent)
    ).splitlines()
    hidden = found == str(foreign)
    assert hidden or not regular  # a plain folder hides an editable installation, and not an installed wheel
    assert ("ok=False" in check and OWN_ENVS in check) if hidden else "ok=True" in check


def test_doctor_fails_on_a_data_folder_that_cannot_be_made(tmp_path, monkeypatch):
    blocked = tmp_path / "a file"
    blocked.touch()
    monkeypatch.setenv("RAYFT_DATA", str(blocked / "data"))
    check = next(check for check in doctor.checks() if check.name == "data")
    assert check.ok is False
    assert str(blocked) in check.found
    assert "RAYFT_DATA" in check.remedy
    assert doctor.render([check]) == 1


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy: an old build/ folder would put deleted files into it."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        elif (ROOT / name).is_file():
            shutil.copy(ROOT / name, source / name)
    subprocess.run([sys.executable, "-m", "build", "--wheel", "--outdir", target, source], check=True)
    (built,) = target.glob("*.whl")
    return built


@pytest.mark.slow
def test_the_wheel_holds_both_packages_weights_and_run_files_in_20_mb(wheel):
    assert wheel.stat().st_size <= 20e6
    held = set(zipfile.ZipFile(wheel).namelist())
    for package in ("rayft", "envs"):
        for path in (ROOT / package).rglob("*"):
            if path.suffix in (".py", ".safetensors", ".html", ".json"):
                assert path.relative_to(ROOT).as_posix() in held
    assert any(name.startswith("envs/") and name.endswith(".safetensors") for name in held)
    for path in (ROOT / "tune_configs").glob("*.yaml"):
        assert f"rayft/configs/{path.name}" in held
    assert any(name.endswith("licenses/LICENSE") for name in held)
    assert {name.split("/")[0] for name in held if ".dist-info/" not in name} == {"rayft", "envs"}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_an_installed_wheel_fine_tunes_from_an_empty_folder(wheel, tmp_path):
    venv, empty = tmp_path / "venv", tmp_path / "empty"
    empty.mkdir()
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    subprocess.run([venv / "bin" / "pip", "install", "--quiet", wheel], check=True, env=environment)

    def rayft(*arguments: str) -> str:
        command = [venv / "bin" / "rayft", *arguments]
        done = subprocess.run(command, cwd=empty, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert "toy_ppo" in rayft("configs")
    rayft("doctor")
    rayft("run", "toy_ppo", "iterations=2")
    assert list(empty.rglob("report.html"))
    assert list(empty.rglob("*.safetensors"))
