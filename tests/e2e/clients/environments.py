"""Clients in folders of their own under .venv/e2e (removed by `make clean`), from exact versions.

Only `make test-e2e` installs (E2E_INSTALL); without it a test of a client that is not there yet is skipped.
"""

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

HERE = Path(__file__).parent
CACHE = Path(sys.prefix) / "e2e"
INSTALL_SECONDS = 600
WITHOUT_SCRIPTS = ("ci", "--ignore-scripts", "--no-audit", "--no-fund")


def node_packages(name: str) -> Path:
    """The folder with node_modules and the scripts of `clients/NAME`."""
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("npm is missing; install Node 20 or later")
    source = HERE / name

    def install(folder: Path) -> None:
        for file in ("package.json", "package-lock.json"):
            shutil.copy(source / file, folder)
        _run([npm, *WITHOUT_SCRIPTS], folder)

    folder = _made(name, source / "package-lock.json", install)
    for script in source.glob("*.mjs"):  # node looks for packages beside the script
        shutil.copy(script, folder)
    return folder


def python(name: str) -> Path:
    """The interpreter of an environment with `clients/requirements/NAME.txt`."""
    requirements = HERE / "requirements" / f"{name}.txt"

    def install(folder: Path) -> None:
        _run([sys.executable, "-m", "venv", str(folder)], folder)
        pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        _run([*pip, "--requirement", str(requirements)], folder)

    return _made(name, requirements, install) / "bin" / "python"


def _made(name: str, versions: Path, install: Callable[[Path], None]) -> Path:
    digest = hashlib.sha256(versions.read_bytes()).hexdigest()[:12]
    folder = CACHE / f"{name}-{digest}"
    complete = folder / ".complete"
    if complete.exists():
        return folder
    if "E2E_INSTALL" not in os.environ:
        pytest.skip(f"{name} is not installed; run `make test-e2e`")
    CACHE.mkdir(parents=True, exist_ok=True)
    with FileLock(CACHE / f"{name}.lock"):
        if not complete.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            install(folder)
            complete.touch()
    return folder


def _run(command: list[str], folder: Path) -> None:
    try:
        subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True, timeout=INSTALL_SECONDS)
    except subprocess.SubprocessError as error:
        lines = str(getattr(error, "stderr", None) or error).splitlines()
        reason = " ".join([line for line in lines if "error" in line.lower()] or lines)
        pytest.skip(f"{folder.name} cannot be installed here: {reason[:400]}")
