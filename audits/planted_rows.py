"""Packages that claim rows: the name of a strategy, and a data set that counts as public."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

from audits.faults import SOUND, Fault
from audits.finding import judged
from fedveil.common import registered
from fedveil.common.data.named import DATASETS, NamedDataset
from fedveil.common.errors import ConfigError
from fedveil.common.findings import Finding
from fedveil.common.rows import Table
from fedveil.experiments.api import register
from fedveil.strategies import STRATEGIES

CLAIMS = {
    "fedavg-lora": """
from fedveil.strategies.ffa_lora import FFALoRA
class Claimed(FFALoRA):
    name = "fedavg-lora"
""",
    "hospital": """
from fedveil.common.data.named import NamedDataset, UserFile
Claimed = NamedDataset("hospital", UserFile("hospital.csv", "the hospital has"), "classification")
""",
    "own": """
from fedveil.strategies.ffa_lora import FFALoRA
class Claimed(FFALoRA):
    name = "own"
""",
}
"""The module of each package, by the name that it claims: of a strategy, of a public data set, and one that is free."""
MARK = "from pathlib import Path\nPath({mark!r}).write_text('loaded')\n"


@contextmanager
def installed(folder: Path, name: str) -> Iterator[Path]:
    """Install a package that claims ``name``; yield the file that is there once its module was loaded."""
    module, mark = f"planted_{name.replace('-', '_')}", folder / "mark"
    about = folder / f"{module}-1.0.dist-info"
    about.mkdir(parents=True)
    (folder / f"{module}.py").write_text(MARK.format(mark=str(mark)) + CLAIMS[name], encoding="utf-8")
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n", encoding="utf-8")
    (about / "entry_points.txt").write_text(f"[{register.GROUP}]\n{name} = {module}:Claimed\n", encoding="utf-8")
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        yield mark
    finally:
        sys.path.remove(str(folder))
        sys.modules.pop(module, None)


@contextmanager
def restored() -> Iterator[None]:
    """Take out afterwards what was registered."""
    with (
        patch.object(STRATEGIES, "_rows", dict(STRATEGIES._rows)),
        patch.object(DATASETS, "_rows", dict(DATASETS._rows)),
        patch.object(registered, "_ROWS", list(registered.registered_rows())),
    ):
        yield


@contextmanager
def any_name() -> Iterator[None]:
    """A name that FedVeil has can be taken."""
    with patch.object(register, "_check_free", lambda *_: None), patch.object(Table, "_check_free", lambda *_: None):
        yield


def any_kind() -> AbstractContextManager[Any]:
    """A data set can be registered, as a strategy can."""
    kind_of, check = register._kind_of, register._check_whole
    return patch.multiple(
        register,
        _kind_of=lambda row: ("data set", DATASETS) if isinstance(row, NamedDataset) else kind_of(row),
        _check_whole=lambda kind, row: None if isinstance(row, NamedDataset) else check(kind, row),
    )


TAKEN = Fault("a package takes the name of a strategy", any_name)
PUBLIC = Fault("a package's data set counts as public", any_kind)


def audit_claimed_name(folder: Path, fault: Fault = SOUND) -> Finding:
    """Return whether a package that claims ``fedavg-lora`` gets that name.

    Args:
        folder: empty; the package goes there.
        fault: SOUND or TAKEN.
    """
    own = STRATEGIES["fedavg-lora"]
    with installed(folder, "fedavg-lora"), restored(), fault.plant():
        with suppress(ConfigError):
            register.register_named({"strategy": "fedavg-lora"})
        taken = STRATEGIES["fedavg-lora"] is not own
    return judged("a package that claims fedavg-lora", fault.name, taken, {"got the name": str(taken)})


def audit_claimed_data(folder: Path, fault: Fault = SOUND) -> Finding:
    """Return whether a package that claims a public data set makes it one that FedVeil names.

    Args:
        folder: empty; the package goes there.
        fault: SOUND or PUBLIC.
    """
    with installed(folder, "hospital"), restored(), fault.plant():
        with suppress(ConfigError):
            register.register_named({"strategy": "hospital"})
        public = "hospital" in DATASETS
    return judged("a package that claims a public data set", fault.name, public, {"counts as public": str(public)})
