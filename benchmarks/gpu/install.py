"""The gate's first stage: this checkout installed, editable and with its extension built, without any network.

The kernels live in ``kernels/`` and are imported as ``flexlora_fast.kernels``: an installation knows that, a folder on
``PYTHONPATH`` does not. So a virtual environment is made for this run, which sees every package of the Python that has
torch and adds this checkout to them. Every run makes it anew, and nothing is written into that Python.
``--system-site-packages`` would not do: where that Python is itself one of a virtual environment, it shows the packages
of the Python below.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from benchmarks.gpu import stage
from benchmarks.gpu.commit import ROOT
from benchmarks.gpu.stage import Options, Report

VENV = ROOT / ".venv-gpu"
CHECK = """
import json, flexlora_fast
from flexlora_fast import _native, kernels
from flexlora_fast.backends import launcher
import torch
print(json.dumps({
    "cuda": launcher.path() or launcher.obstacle(),
    "detours": launcher.detours() if torch.cuda.is_available() else "",
    "package": flexlora_fast.__file__, "extension": _native.reason or "built",
    "kernels": kernels.obstacle() or "usable",
    "cuda kernels": launcher.path() or launcher.obstacle(),
    "torch": torch.__version__, "gpu": torch.cuda.is_available(),
}))
"""


def environment(python: str) -> dict[str, str]:
    """Of every stage: the programs beside ``python`` (ninja) may not be on PATH; where results go is the gate's."""
    kept = {name: value for name, value in os.environ.items() if name != "OUT"}
    path = os.pathsep.join([str(Path(shutil.which(python) or python).parent), kept.get("PATH", os.defpath)])
    return kept | {"PATH": path, "PYTHONUNBUFFERED": "1"}


def make(venv: Path, root: Path) -> str:
    """The virtual environment with this checkout in it; its Python. CalledProcessError where a step fails."""
    shutil.rmtree(venv, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    python = venv / "bin" / "python"
    show = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = Path(subprocess.run([python, "-c", show], check=True, capture_output=True, text=True).stdout.strip())
    # After "__editable__…" in the order of names: this checkout comes before one that the Python may have installed.
    lines = [f"import site; site.addsitedir({path!r})\n" for path in parent_packages()]
    (packages / "parent.pth").write_text("".join(lines))
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-index", "--no-deps"]
    subprocess.run([*pip, "--no-build-isolation", "--editable", str(root)], check=True)
    return str(python)


def parent_packages() -> list[str]:
    """Where this Python's packages are."""
    paths = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    paths += [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    return list(dict.fromkeys(path for path in paths if Path(path).is_dir()))


def measure(options: Options, report: Report) -> None:
    """Install, and say what is there: extension, kernels, torch. A build without the extension, or
    without its CUDA kernels where there is a GPU, fails.
    """
    if options.quick and not options.cuda:
        report.skip("a quick run takes the flexlora_fast of this Python")
        return
    python = make(VENV, ROOT)
    done = subprocess.run([python, "-c", CHECK], capture_output=True, text=True, check=False, cwd=ROOT.parent)
    print(done.stderr, flush=True)
    if done.returncode != 0:
        sys.exit("the installed package cannot be imported")
    found = json.loads(done.stdout.splitlines()[-1])
    package = Path(found.pop("package")).resolve()
    print(json.dumps(found), flush=True)
    report.update(found)
    report["python"] = str(Path(python).relative_to(ROOT))  # the stages that follow take it
    if package.parents[1] != ROOT:
        sys.exit(f"flexlora_fast is imported from {package}, not from {ROOT}")
    if found["extension"] != "built":
        sys.exit(f"the extension: {found['extension']}")
    if options.cuda and found["kernels"] != "usable":
        sys.exit(f"the kernels: {found['kernels']}")
    if options.cuda and found["cuda"] != "compiled":
        sys.exit(f"the CUDA kernels: {found['cuda']} ({found['detours']})")


if __name__ == "__main__":
    stage.run(measure)
