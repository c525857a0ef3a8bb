"""Carries this project to a machine without network: collects wheels here, and installs them there beside its PyTorch.

    python -m tests.gpu.wheels collect FOLDER [--without NAME ...]    needs a package index, and our own environment
    python -m tests.gpu.wheels install FOLDER ENVIRONMENT             needs nothing but Python with pip and PyTorch

Neither imports anything outside the standard library until it is needed, because the machine there has little.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Collection
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
TARGET_PYTHON = "3.12"
# What the other machine has: PyTorch with all that it needs itself, and the libraries whose models we compare with.
GIVEN, GIVEN_WITH_REQUIREMENTS = ("timm", "transformers"), ("torch", "torchvision")
NEEDED = ("video-swinv2[export]", "pytest", "pytest-xdist")  # pytest runs the tests, xdist several at once


def requirements(roots: Collection[str], without: Collection[str]) -> dict[str, str]:
    """The roots and everything that they need, name -> version, as in the present environment.

    The packages in `without` are left out, and what only they need as well.
    """
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    found: dict[str, str] = {}
    seen: set[tuple[str, frozenset[str]]] = set()
    waiting = [Requirement(text) for text in roots]
    while waiting:
        wanted = waiting.pop()
        name, extras = canonicalize_name(wanted.name), frozenset(wanted.extras)
        if name in without or (name, extras) in seen:
            continue
        seen.add((name, extras))
        distribution = importlib.metadata.distribution(name)
        found[name] = distribution.version
        for text in distribution.requires or ():
            needed = Requirement(text)
            environments = [{"extra": extra, "python_version": TARGET_PYTHON} for extra in (*extras, "")]
            if needed.marker is None or any(needed.marker.evaluate(each) for each in environments):
                waiting.append(needed)
    return found


def collect(folder: Path, without: Collection[str]) -> None:
    """Fill `folder` with wheels for Linux and TARGET_PYTHON, and print their sizes.

    Packages without a wheel in the index are built; that must give a wheel for any Python.
    """
    folder.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"DS_BUILD_OPS": "0"}  # DeepSpeed's own kernels are never used
    given = {*GIVEN, *requirements(GIVEN_WITH_REQUIREMENTS, ()), *without}
    needed = requirements(NEEDED, given)
    del needed["video-swinv2"]  # the tests run from the repository
    for name, version in sorted(needed.items()):
        if any(_distribution_name(wheel) == name for wheel in folder.glob("*.whl")):
            continue
        package = f"{name}=={version}"
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
        binary = ["--only-binary=:all:", "--python-version", TARGET_PYTHON, "--implementation", "cp"]
        downloaded = subprocess.run(
            [*pip, "download", "--no-deps", *binary, "--dest", str(folder), package], capture_output=True, check=False
        )
        if downloaded.returncode:
            with tempfile.TemporaryDirectory() as built:
                subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", built, package], check=True, env=environment)
                (wheel,) = Path(built).glob("*.whl")
                if not wheel.name.endswith("-none-any.whl"):
                    raise SystemExit(f"{wheel.name}: built for this Python only; find a wheel for {TARGET_PYTHON}")
                shutil.copy(wheel, folder)
    for wheel in sorted(folder.glob("*.whl"), key=lambda path: -path.stat().st_size):
        print(f"{wheel.stat().st_size / 2**20:6.1f} MiB  {wheel.name}")
    total = sum(wheel.stat().st_size for wheel in folder.glob("*.whl"))
    print(f"{total / 2**20:6.1f} MiB  in all")


def _distribution_name(wheel: Path) -> str:
    return wheel.name.split("-")[0].lower().replace("_", "-").replace(".", "-")


def install(folder: Path, environment: Path) -> None:
    """Create `environment`, a virtual environment with the wheels, this repository, and all that this Python has.

    A virtual environment on top of another one would not see its packages (`--system-site-packages` means those of the
    Python below both). So they are named in a .pth file, after the wheels, which therefore win.
    """
    # Without pip, because ensurepip is missing in some distributions of Linux: this Python's own pip installs.
    subprocess.run([sys.executable, "-m", "venv", "--clear", "--without-pip", str(environment)], check=True)
    variables = {"base": str(environment), "platbase": str(environment)}
    packages = Path(
        sysconfig.get_path("purelib", "venv" if "venv" in sysconfig.get_scheme_names() else None, variables)
    )
    wheels = sorted(str(path) for path in folder.glob("*.whl"))
    if not wheels:
        raise SystemExit(f"{folder}: no wheels there; fill it with make gpu-wheels WHEELS={folder}")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    subprocess.run([*pip, "install", "--no-index", "--no-deps", "--target", str(packages), *wheels], check=True)
    # `addsitedir` also reads the .pth files in these folders, which merely naming them would not.
    here = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    lines = [str(REPOSITORY), *(f"import site; site.addsitedir({path!r})" for path in here)]
    (packages / "beside.pth").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    """See the docstring of this module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    collecting = verbs.add_parser("collect", help="collect wheels for a machine without network")
    collecting.add_argument("folder", type=Path)
    collecting.add_argument("--without", nargs="*", default=(), metavar="NAME", help="what that machine has as well")
    installing = verbs.add_parser("install", help="install the wheels into a new environment beside this PyTorch")
    installing.add_argument("folder", type=Path)
    installing.add_argument("environment", type=Path)
    options = parser.parse_args()
    if options.verb == "collect":
        collect(options.folder, options.without)
    else:
        install(options.folder, options.environment)


if __name__ == "__main__":
    main()
