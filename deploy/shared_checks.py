"""Checks that a server and a site have in common: versions, private files, certificates, disk, base model."""

from __future__ import annotations

import os
import platform
import shutil
import stat
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from cryptography import x509
from packaging.requirements import Requirement
from packaging.version import Version

from fedveil.deploy.advisories import safe_versions
from fedveil.deploy.certificates import days_left, fingerprint, lacks
from fedveil.deploy.check_results import CheckResult

WATCHED = ("flwr", "torch", "opacus", "transformers", "peft", "dp-accounting", "grpcio")
LOW_DISK_BYTES = 1 << 30
RENEW_DAYS = 30


def versions() -> Iterator[CheckResult]:
    """Python and the packages that results depend on, against FedVeil's own requirements."""
    yield CheckResult(sys.version_info >= (3, 11), "python", f"{platform.python_version()}, 3.11 or newer is needed")
    required = map(Requirement, requires("fedveil") or ())
    wanted = {item.name: item for item in required if not item.marker or item.marker.evaluate({"extra": ""})}
    for name in WATCHED:
        try:
            found = version(name)
        except PackageNotFoundError:
            yield CheckResult(False, name, "not installed: pip install fedveil")
            continue
        allowed = wanted[name].specifier if name in wanted else ""
        fits = name not in wanted or wanted[name].specifier.contains(found, prereleases=True)
        advice = "" if fits else f": pip install '{name}{allowed}'"
        yield CheckResult(fits, name, f"{found}, allowed is {allowed}{advice}")


def advisories() -> Iterator[CheckResult]:
    """No installed package is one that a known advisory is of and a newer version mends; one line for each that is."""
    safe = []
    for name, mended in safe_versions().items():
        try:
            found = Version(version(name))
        except PackageNotFoundError:
            continue  # of an extra, or of what installs packages: what is not there has no fault
        if found >= mended:
            safe.append(f"{name} {found}")
            continue
        # Without what it asks for: Flower's pin would bring an older cryptography back.
        advice = f"pip install --upgrade --no-deps --only-binary :all: '{name}>={mended}'"
        yield CheckResult(False, name, f"{found} has known advisories, see docs/reference/advisories.md: {advice}")
    yield CheckResult(True, "advisories", f"none is known of {', '.join(safe)}")


def private_file(path: Path, what: str) -> Iterator[CheckResult]:
    """A private file is there, and only its owner can read it."""
    if not path.is_file():
        yield CheckResult(False, what, f"{path} is missing: restore it, or make the folder again")
        return
    mode = stat.S_IMODE(path.stat().st_mode)
    advice = "" if not mode & 0o077 else f"; others can read it: chmod 600 {path}"
    yield CheckResult(not mode & 0o077, what, f"{path}, mode {mode:04o}{advice}")


def validity(certificate: x509.Certificate, what: str, renewal: str) -> Iterator[CheckResult]:
    """A certificate is valid now, and for how long."""
    left = days_left(certificate)
    if certificate.not_valid_before_utc > datetime.now(UTC):
        yield CheckResult(
            False, what, f"not valid before {certificate.not_valid_before_utc:%Y-%m-%d %H:%M} UTC: set the clock"
        )
    elif left < 0:
        yield CheckResult(False, what, f"expired {-left:.0f} days ago: {renewal}")
    else:
        soon = f", {renewal}" if left < RENEW_DAYS else ""
        yield CheckResult(True, what, f"valid for {left:.0f} more days{soon}; SHA-256 {fingerprint(certificate)}")


def strictness(certificate: x509.Certificate, what: str, renewal: str) -> Iterator[CheckResult]:
    """A certificate has what Python 3.13 and newer ask of it; nothing is said where it has."""
    missing = lacks(certificate)
    if missing:
        yield CheckResult(False, what, f"it lacks {', '.join(missing)}, so Python 3.13 and newer refuse it: {renewal}")


def disk(path: Path, what: str, place: str = "") -> Iterator[CheckResult]:
    """There is room and the right to write where ``path`` is or will be, which the result calls ``place``, if given."""
    folder = path
    while not folder.exists():
        folder = folder.parent
    free, name = shutil.disk_usage(folder).free, place or folder
    if not os.access(folder, os.W_OK):
        yield CheckResult(False, what, f"{name} may not be written: give this user the right to")
        return
    low = free < LOW_DISK_BYTES
    advice = ": make room, a full disk stops training" if low else ""
    yield CheckResult(not low, what, f"{free / (1 << 30):.1f} GiB free at {name}{advice}")


def base_model(name: str, task: str, expected: str) -> Iterator[CheckResult]:
    """The base model loads, and is the coordinator's (FINGERPRINT+FILES; empty: unknown); no other file is opened."""
    from fedveil.common.model.base import load_base_model  # imports torch and transformers
    from fedveil.common.model.files import files_of

    files = files_of(name)
    if expected and files != expected.partition("+")[2]:
        found = f"files of the hash {files}, of which none was opened"
    else:
        found = load_base_model(name, task, files=files).pin
    if expected and found != expected:
        yield CheckResult(
            False, "base model", f"{name} has {found}; the coordinator's is {expected}: install the same model"
        )
    else:
        note = "the coordinator's" if expected else "compare it with the coordinator's"
        yield CheckResult(True, "base model", f"{name}, fingerprint {found} ({note})")
