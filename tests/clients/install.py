"""Installs what the tests of this folder run into `.clients/`: `python -m tests.clients.install`, for any Python from 3.11 on.

Each part is installed again only if its manifest changed. What the machine itself must have (Node.js, Go, Maven, Chromium)
is not installed here: a sentence names what is missing.
"""

import hashlib
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
DRIVERS = Path(__file__).parent / "drivers"
CACHE = ROOT / ".clients"

PYTHON = CACHE / "python" / "bin" / "python"
"""Runs the tests of this folder and the drivers in Python."""

SSECLIENT = CACHE / "sseclient"
"""A folder for the Python path: the module `sseclient` of the package sseclient, not of sseclient-py."""

NODE = CACHE / "node"
GO = CACHE / "go" / "bin"
JAVA = CACHE / "java" / "target"

NEEDED = {
    "node": "nodejs",
    "npm": "npm",
    "go": "golang",
    "mvn": "maven",
    "javac": "default-jdk-headless",
    "chromium": "chromium",
    "chromedriver": "chromium-driver",
}
"""Command -> Debian's package."""


def main() -> int:
    """Install what is missing; the exit status."""
    missing = [f"{command} (apt-get install {package})" for command, package in NEEDED.items() if shutil.which(command) is None]
    if missing:
        print(f"tests/clients needs {', '.join(missing)}.", file=sys.stderr)
        return 1
    node_programs = list(DRIVERS.glob("*/main.mjs"))
    go_programs = [DRIVERS / "go.mod", DRIVERS / "go.sum", *DRIVERS.glob("*/main.go")]
    java_program = DRIVERS / "okhttp-eventsource"
    _part("python", [ROOT / "requirements.txt", ROOT / "deploy" / "requirements.txt", DRIVERS / "requirements.txt"], _install_python)
    _part("node", [DRIVERS / "package.json", DRIVERS / "package-lock.json", *node_programs], _install_node)
    _part("go", go_programs, _install_go)
    _part("java", [java_program / "pom.xml", java_program / "Main.java"], _install_java)
    return 0


def _part(name: str, manifests: Sequence[Path], install: Callable[[], None]) -> None:
    """Call `install` unless it was called with these very files before."""
    found = hashlib.sha256(b"".join(path.read_bytes() for path in manifests)).hexdigest()
    stamp = CACHE / f"{name}.installed"
    if stamp.exists() and stamp.read_text() == found:
        return
    print(f"installing the clients in {name} into {CACHE.name}/", flush=True)
    CACHE.mkdir(exist_ok=True)
    install()
    stamp.write_text(found)


def _install_python() -> None:
    _run(sys.executable, "-m", "venv", PYTHON.parent.parent)
    pip: list[str | Path] = [PYTHON, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    _run(*pip, "-r", ROOT / "requirements.txt", "-r", DRIVERS / "requirements.txt")
    _run(*pip, "--target", SSECLIENT, "--upgrade", "--no-deps", "sseclient==0.0.27")
    _run(*pip, "six==1.17.0")  # which sseclient needs


def _install_node() -> None:
    NODE.mkdir(exist_ok=True)
    for name in ("package.json", "package-lock.json"):
        shutil.copy(DRIVERS / name, NODE)
    _run("npm", "ci", "--silent", "--no-audit", "--no-fund", folder=NODE)
    for program in DRIVERS.glob("*/main.mjs"):  # beside node_modules, which is where Node.js looks for packages
        shutil.copytree(program.parent, NODE / program.parent.name, dirs_exist_ok=True)


def _install_go() -> None:
    GO.mkdir(parents=True, exist_ok=True)
    _run("go", "build", "-o", f"{GO}/", "./...", folder=DRIVERS)


def _install_java() -> None:
    shutil.copytree(DRIVERS / "okhttp-eventsource", JAVA.parent, dirs_exist_ok=True)
    _run("mvn", "--quiet", "--batch-mode", "package", folder=JAVA.parent)


def _run(*command: str | Path, folder: Path = ROOT) -> None:
    """Run a command. Raises CalledProcessError if it fails."""
    subprocess.run([str(word) for word in command], cwd=folder, check=True)


if __name__ == "__main__":
    sys.exit(main())
