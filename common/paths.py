"""The folder of a run, and its name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from glob import escape
from pathlib import Path, PurePath

from fedveil.common.check import PLAIN_NAME
from fedveil.common.config.flat import Scalar
from fedveil.common.config.run import RunConfig
from fedveil.common.errors import ConfigError, DataError
from fedveil.common.files import ABOUT_ADAPTER, ABOUT_RUN, PROCESS, expanded

RUN_NAME = PLAIN_NAME
"""A server chooses it."""
REPLIES = "replies"
"""In a run's folder, what simulated sites answered last."""


LATEST = "latest"
"""Names the run that began, or went on, last."""


SHORT_DIGITS = 4
"""Of a run's id, at least, that name it."""
SHORT = re.compile(rf"(^|-)[0-9]{{{SHORT_DIGITS},}}$")


def runs_in(output: Path) -> list[Path]:
    """Return the folders of the runs in ``output``, the one that began or went on last at the end.

    A run that is being started has a process before it has settings.
    """
    found = {path.parent: path for name in (PROCESS, ABOUT_RUN) for path in output.glob(f"*/{name}")}
    return sorted(found, key=lambda folder: found[folder].stat().st_mtime_ns)


def named_run(name: str, output: str = "", holding: str = ABOUT_RUN) -> Path:
    """Return the folder of the run that ``name`` names: by its path, its id in ``output``, or as ``latest``.

    The first ``SHORT_DIGITS`` digits of an id, or more, are a name too, where one run alone begins so. A folder may
    stand before such a name.

    Args:
        name: as people write it.
        output: folder of the runs; empty: the default's.
        holding: a file that the folder must have.

    Raises:
        ConfigError: no run, or more than one, has the name.
    """
    runs = expanded(output or RunConfig().output)
    places = [expanded(name), runs / name, *sorted(runs.glob(f"*-{escape(name)}"))]
    files = {holding, PROCESS} if holding == ABOUT_RUN else {holding}
    found = [place.absolute() for place in places if any((place / file).is_file() for file in files)]
    given = expanded(name)
    if not found and (given.name == LATEST or SHORT.search(given.name)):
        runs = runs if given.parent == Path() else given.parent
        there = [place.absolute() for place in runs_in(runs) if any((place / file).is_file() for file in files)]
        found = there[-1:] if given.name == LATEST else [place for place in there if _begins(place.name, given.name)]
    found = list(dict.fromkeys(found))
    if len(found) != 1:
        none = f"no run{' with a checkpoint' * (holding != ABOUT_RUN)} in {runs.absolute()}"
        many = f"more than one run: {', '.join(map(str, found))}" if found else none
        raise ConfigError(f"{name!r} names {many}; give the path of the run's folder (`fedveil runs` lists them)")
    return found[0]


def _begins(folder: str, name: str) -> bool:
    """Return whether a run's folder, or its id in it, begins with a name.

    >>> _begins("ffa-lora-15531509587381829735", "1553"), _begins("ffa-lora-15531509587381829735", "ffa-lora-1553")
    (True, True)
    """
    return folder.startswith(name) or folder.rpartition("-")[2].startswith(name)


def short_name(folder: str, folders: Iterable[str]) -> str:
    """Return the fewest digits that name a run's folder among others; the folder's name where its id is no number.

    >>> short_name("ffa-lora-15531509587381829735", ["ffa-lora-15531509587381829735", "fed-sb-15531600000000000000"])
    '155315'
    """
    own, others = folder.rpartition("-")[2], [name.rpartition("-")[2] for name in folders if name != folder]
    lengths = range(SHORT_DIGITS, len(own) + 1) if own.isdecimal() else ()
    short = (own[:length] for length in lengths)
    return next((one for one in short if not any(other.startswith(one) for other in others)), folder)


def given_run(place: Path) -> Path:
    """Return the folder that a command is given: one that is there, or that of the run which has the name."""
    return place if place.exists() else named_run(str(place))


PATHS = (
    "data.name",
    "data.test",
    "model.name",
    "output",
    "privacy.ledger",
    "resume",
    "rollout.judge",
    "start.data",
    "start.library",
    "start.text",
)
"""Settings that may be a path."""


def without_paths(settings: Mapping[str, Scalar]) -> dict[str, Scalar]:
    """Return a run's settings for others, with the last part of each absolute path on this machine."""
    return {
        key: PurePath(value).name if key in PATHS and isinstance(value, str) and is_path(value) else value
        for key, value in settings.items()
    }


def is_path(name: str) -> bool:
    """Whether a data set or a model is named by an absolute path, or by one that ``local_name`` made."""
    return name.startswith(("/", "~", "./"))


def local_name(name: str) -> str:
    """Return a model's name for others: of an absolute path the last part, as a folder beside whoever loads it.

    >>> local_name("/srv/models/own"), local_name("all-MiniLM-L6-v2")
    ('./own', 'all-MiniLM-L6-v2')
    """
    return f"./{PurePath(name).name}" if is_path(name) else name


def check_adapter(folder: Path) -> None:
    """Raise DataError unless a folder holds a saved adapter; commands ask before they import what takes seconds."""
    if not (folder / ABOUT_ADAPTER).is_file():
        raise DataError(
            f"{folder} holds no adapter, which is written at a run's end: name a finished run (`fedveil runs` lists "
            "them), or resume this one"
        )


def check_vacant(folder: Path) -> None:
    """Raise DataError if there is a folder already, and something is in it."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(f"{folder} exists already, and nothing is written over: name a new folder")


def run_folder(config: RunConfig, run: str) -> Path:
    """Return the folder of a run; server and simulated sites agree on it without talking.

    A resumed run goes on in the folder that ``resume`` names, by its path or by the run's id.
    """
    output = expanded(config.output).absolute()
    if not config.resume:
        return output / f"{config.method}-{run}"
    named = expanded(config.resume)
    if named.name != config.resume:
        return named.absolute()
    return output / (named.name if named.name.startswith(f"{config.method}-") else f"{config.method}-{named.name}")


def reply_file(config: RunConfig, run: str, site: str) -> Path:
    """Return where a simulated site keeps its last reply, in a folder of the run's own that ends with the run."""
    return run_folder(config, run) / REPLIES / site


def run_name(config: RunConfig, run: str) -> str:
    """Return what messages, records and ledgers call the run: Flower's id, when resumed that of the first start.

    It follows from the words of ``resume`` alone: a site that expanded ``~`` or looked at a folder would tell the
    server what its users are called.

    Raises:
        ConfigError: it is not made of plain characters.
    """
    name = PurePath(config.resume).name.removeprefix(f"{config.method}-") if config.resume else run
    if not RUN_NAME.fullmatch(name):
        raise ConfigError(
            f"the run's name is {name[:70]!r}, which is not a letter or digit and at most 63 of letters, digits, '.', "
            "'_' and '-' after it: resume names the folder of a run by the name that it began with"
        )
    return name
