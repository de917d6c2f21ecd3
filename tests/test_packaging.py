"""What is installed: version, command, data files; and the wheel, with and without its extension."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import flexlora_fast

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REQUIREMENTS = [
    Requirement(line)
    for line in (*PROJECT["dependencies"], *(r for extra in PROJECT["optional-dependencies"].values() for r in extra))
]


def test_the_installed_version_is_the_projects():
    assert importlib.metadata.version("flexlora_fast") == PROJECT["version"]


def test_the_command_is_installed_and_loads():
    (command,) = importlib.metadata.entry_points(group="console_scripts", name="flexlora-fast")
    assert command.value == "flexlora_fast.cli:main"
    assert callable(command.load())


def test_the_kernels_are_part_of_the_package_though_they_live_beside_it():
    from flexlora_fast import kernels

    assert kernels.__name__ == "flexlora_fast.kernels"
    assert Path(kernels.__file__).parent.name == "kernels"


def test_type_checkers_are_told_that_the_package_is_typed():
    assert (Path(flexlora_fast.__file__).parent / "py.typed").exists()


def test_users_get_ranges_and_never_exact_pins():
    pinned = [str(r) for r in REQUIREMENTS if any(s.operator in {"==", "==="} for s in r.specifier)]
    assert not pinned


def test_make_pins_every_declared_dependency_exactly():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    pins = {canonicalize_name(r.name): r.specifier for r in map(Requirement, lines)}
    assert all([s.operator for s in specifier] == ["=="] for specifier in pins.values())
    for requirement in REQUIREMENTS:
        name = canonicalize_name(requirement.name)
        if name != canonicalize_name(PROJECT["name"]):
            (pin,) = pins[name]
            assert requirement.specifier.contains(pin.version), f"{name}: {pin} is outside {requirement.specifier}"


def test_ci_runs_what_developers_run():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert "set -euo pipefail" in script.read_text() and "make test" in script.read_text()


# ------------------------------------------------------------------------------------------------- building wheels


def python(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python as a user outside this checkout would: nothing of it on the path, no switches but the given."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("FLEXLORA_") and k != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env={**kept, **environment},
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """This project as its source distribution, unpacked: what a build from the package index starts from."""
    folder = tmp_path_factory.mktemp("source")
    files = "pyproject.toml setup.py build_cuda.py MANIFEST.in LICENSE README.md constraints.txt Makefile"
    for name in files.split():
        shutil.copy(ROOT / name, folder)
    for name in ("flexlora_fast", "kernels", "csrc"):
        # Also without what an in-place build left behind: the wheel must bring its own.
        ignored = shutil.ignore_patterns("__pycache__", "*.so", "_build_info.json")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    built = python("-c", "from setuptools import build_meta; print(build_meta.build_sdist('dist'))", cwd=folder)
    assert built.returncode == 0, built.stderr
    (archive,) = (folder / "dist").glob("*.tar.gz")
    shutil.unpack_archive(archive, folder / "unpacked")
    return folder / "unpacked" / archive.name.removesuffix(".tar.gz")


def build(source: Path, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Build a wheel from a copy of ``source`` into ``folder``."""
    copy = shutil.copytree(source, folder / "source")
    arguments = ("--no-build-isolation", "--no-deps", "--no-cache-dir", "-v", "-w", str(folder), str(copy))
    done = python("-m", "pip", "wheel", *arguments, cwd=folder, **environment)
    done.stdout += done.stderr  # pip passes the build's own output on in either
    return done


def install(folder: Path) -> Path:
    """Unpack the wheel in ``folder``, as pip would without its dependencies."""
    (wheel,) = folder.glob("*.whl")
    target = folder / "installed"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    return target


REPORT = """
import json, flexlora_fast
from flexlora_fast import _native, doctor, kernels
from flexlora_fast.backends import launcher, nvrtc
check = next(c for c in doctor.checks() if c.name == "extension")
places = [flexlora_fast.__file__, kernels.__file__, str(nvrtc.folder())]
print(json.dumps([*places, _native.reason, check.status, launcher.not_compiled()]))
"""


def report(target: Path) -> list[str | None]:
    """Import the installed package in a fresh Python: why no extension, the doctor's status, why no CUDA kernels."""
    done = python("-c", REPORT, cwd=target.parent, PYTHONPATH=str(target))
    assert done.returncode == 0, done.stderr
    package, kernels, cuda, *found = json.loads(done.stdout)
    assert package == str(target / "flexlora_fast" / "__init__.py")
    assert kernels == str(target / "flexlora_fast" / "kernels" / "__init__.py")
    assert cuda == str(target / "flexlora_fast" / "csrc" / "cuda")
    return found


@pytest.mark.slow
@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "c++")) is None, reason="no C++ compiler")
def test_the_wheel_holds_everything_and_works(source, tmp_path):
    done = build(source, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "flexlora_fast: built the native extension" in done.stdout
    assert "-march=native" not in done.stdout
    target = install(tmp_path)
    expected = {
        path.relative_to(ROOT)
        for path in (ROOT / "flexlora_fast").rglob("*")
        if path.is_file() and path.suffix not in {".so", ".pyc"} and path.name != "_build_info.json"
    } | {Path("flexlora_fast", "kernels", path.name) for path in (ROOT / "kernels").glob("*.*")}
    expected |= {Path("flexlora_fast", "csrc", "cuda", path.name) for path in (ROOT / "csrc" / "cuda").glob("*.cuh")}
    assert not [str(path) for path in expected if not (target / path).exists()]
    assert list(target.glob("flexlora_fast-*.dist-info/licenses/LICENSE"))
    reason, status, no_cuda = report(target)
    assert (reason, status) == (None, "ok")
    assert torch.version.cuda or f"torch {torch.__version__} is built without CUDA" in no_cuda


@pytest.mark.slow
@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"FLEXLORA_NO_EXTENSION": "1"}, "FLEXLORA_NO_EXTENSION was set while building"),
        ({"CXX": "/nowhere/c++"}, "no C++ compiler: none of /nowhere/c++ is on PATH"),
        ({"CXX": "false", "CC": "false"}, "the build failed ("),
    ],
)
def test_without_extension_the_wheel_still_works_and_says_why(source, tmp_path, environment, reason):
    done = build(source, tmp_path, **environment)
    assert done.returncode == 0, done.stderr
    assert "building WITHOUT the native extension" in done.stdout
    found, status, no_cuda = report(install(tmp_path))
    assert found.startswith("it was not built: ") and reason in found and status == "absent"
    assert found in no_cuda


@pytest.mark.slow
def test_without_torch_at_build_time_the_wheel_still_works(source, tmp_path):
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / "torch.py").write_text("raise ImportError('hidden by a test')")
    done = build(source, tmp_path, PYTHONPATH=str(hidden))
    assert done.returncode == 0, done.stderr
    found, status, _ = report(install(tmp_path))
    assert re.search(r"torch cannot be imported .*--no-build-isolation", found) and status == "absent"


@pytest.mark.slow
def test_the_source_distribution_holds_what_a_build_needs(source):
    for folder, patterns in {"csrc": ("*.cpp", "*.h", "*.cu", "*.cuh"), "kernels": ("*.py", "*.json")}.items():
        for path in (path for pattern in patterns for path in (ROOT / folder).rglob(pattern)):
            assert (source / path.relative_to(ROOT)).exists(), path
    assert (source / "build_cuda.py").exists() and list(source.glob("csrc/cuda/*.cu"))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on PATH")
def test_cuda_kernels_are_built_where_asked_for(source, tmp_path):
    """With any torch, for the named GPUs; and the extension loads without one."""
    done = build(source, tmp_path, FLEXLORA_CUDA="1", TORCH_CUDA_ARCH_LIST="9.0")
    assert done.returncode == 0, done.stdout
    assert "CUDA kernels for ['9.0']" in done.stdout
    assert report(install(tmp_path)) == [None, "ok", None]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "c++")) is None, reason="no C++ compiler")
def test_cuda_kernels_are_left_out_where_asked_for(source, tmp_path):
    done = build(source, tmp_path, FLEXLORA_CUDA="0")
    assert done.returncode == 0 and "no CUDA kernels: FLEXLORA_CUDA=0 was set" in done.stdout
    reason, status, no_cuda = report(install(tmp_path))
    assert (reason, status) == (None, "ok") and "FLEXLORA_CUDA=0 was set while building" in no_cuda


@pytest.mark.slow
@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"CUDA_HOME": "/nowhere"}, "there is no nvcc in /nowhere/bin"),
        ({"FLEXLORA_NO_EXTENSION": "1"}, "FLEXLORA_NO_EXTENSION was set while building"),
    ],
)
def test_cuda_without_what_it_takes_fails_the_build(source, tmp_path, environment, words):
    done = build(source, tmp_path, FLEXLORA_CUDA="1", **environment)
    assert done.returncode != 0 and f"FLEXLORA_CUDA=1, but {words}" in done.stdout.replace("no CUDA toolkit: ", "")


@pytest.mark.slow
@pytest.mark.parametrize(("value", "words"), [("1", "FLEXLORA_CUDA=1, but "), ("yes", "set it to 0 or 1")])
def test_cuda_that_was_asked_for_and_cannot_be_built_fails_the_build(source, tmp_path, value, words):
    # Without any CUDA source the request cannot be met, whatever toolkit is here.
    bare = shutil.copytree(source, tmp_path / "bare", ignore=shutil.ignore_patterns("cuda"))
    done = build(bare, tmp_path, FLEXLORA_CUDA=value)
    assert done.returncode != 0
    assert words in done.stdout
