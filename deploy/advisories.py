"""Known advisories of installed packages, read from ``advisories.toml``, for the doctor and the page of advisories."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from packaging.version import Version

from fedveil.common.strict_json import from_json
from fedveil.common.toml import read_toml


@dataclass(frozen=True)
class Advisory:
    """One advisory of a package."""

    package: str
    """As on PyPI."""
    names: str
    """Its identifiers."""
    what: str
    mended: str
    """The first version without it."""
    status: str
    """Whether FedVeil reaches it."""
    checked: str = "other projects' public upgrade notes"
    """Source for the version in which it is mended."""

    def row(self) -> str:
        """Return it as a row of the table in docs/reference/advisories.md."""
        cells = (f"`{self.package}`", self.names, self.what, self.mended, self.status, self.checked)
        return f"| {' | '.join(cells)} |"


_FILE = Path(__file__).with_name("advisories.toml")
ADVISORIES = tuple(from_json(Advisory, table, _FILE.name) for table in read_toml(_FILE, "the advisories")["advisory"])


def safe_versions() -> dict[str, Version]:
    """Return by package the lowest version that has none of ``ADVISORIES``."""
    packages = dict.fromkeys(advisory.package for advisory in ADVISORIES)
    return {
        package: max(Version(advisory.mended) for advisory in ADVISORIES if advisory.package == package)
        for package in packages
    }
