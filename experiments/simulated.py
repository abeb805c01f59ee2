"""Among how many simulated sites a run's data were divided: kept beside its ``config.json``.

The number is no setting of the run (sites that own their data have none), yet another one divides
the records anew: a run that went on with it would train on records that it holds out for another site's
budget, and figures of two numbers do not compare.
"""

from __future__ import annotations

from pathlib import Path

from server.records import read_json, write_json

NAME = "simulated.json"


def record_sites(folder: Path, sites: int) -> None:
    """Write the number of simulated sites into a run's folder, which is made if need be."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / NAME, {"sites": sites})


def recorded_sites(folder: Path) -> int | None:
    """Return the number of simulated sites of a run; None if its folder does not say."""
    if not (folder / NAME).is_file():
        return None
    sites: int = read_json(folder / NAME)["sites"]
    return sites
