"""One logger for the project: run, round and site in every line, for people or as JSON lines.

Environment variable ``FEDVEIL_LOG``: ``text`` (default) or ``json``, for what a process writes to
its standard error. A server also keeps ``log.jsonl`` in the run's folder, whatever the variable says.

Nothing computed from records is ever logged: no text, no label, no count, no loss, no norm. The one
exception is a site's own line on rows that are no records, with reasons and how often each occurs. An
unforeseen error can quote a record in its message, so only its type and place are written.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from fedveil.common.check import one_of
from fedveil.common.words import printable

VARIABLE = "FEDVEIL_LOG"
FORMS = ("text", "json")
LONGEST = 1000
"""Characters of one message."""


def about(run: str = "", round_number: int | None = None, site: str = "") -> Mapping[str, object]:
    """Return what a line is about, for a logging call's ``extra``."""
    return {"about": {"run": run, "round": round_number, "site": site}}


class TextLines(logging.Formatter):
    """``12:30:05 WARNING run 7 round 2 site-1: late: no answer in 60 s``."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line for people."""
        line = _fields(record)
        where = " ".join(
            word
            for word in (
                f"run {line['run']}" if line["run"] else "",
                f"round {line['round']}" if line["round"] is not None else "",
                str(line["site"]),
            )
            if word
        )
        return f"{str(line['time'])[11:19]} {line['level']} {where or 'fedveil'}: {line['message']}"


class JsonLines(logging.Formatter):
    """One object a line: ``time`` (UTC), ``level``, ``run``, ``round``, ``site``, ``message``."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line for programs."""
        return json.dumps(_fields(record), ensure_ascii=False)


def _fields(record: logging.LogRecord) -> dict[str, object]:
    context = {"run": "", "round": None, "site": "", **getattr(record, "about", {})}
    # A refusal repeats what the other side sent: no code of its own moves the reader's cursor, or turns a line around.
    message = printable(" ".join(record.getMessage().split()), "?")
    if record.exc_info and record.exc_info[1] is not None:
        message += f" [{place_of(record.exc_info[1])}]"
    moment = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
    return {"time": moment, "level": record.levelname, **context, "message": message[:LONGEST]}


def place_of(error: BaseException) -> str:
    """Return an error's type and where it was raised; never its words, which can quote a record."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}{where}"


class _StandardError(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes to what ``sys.stderr`` is at the moment of writing."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> object:
        """The process's standard error."""
        return sys.stderr


def set_up() -> None:
    """Make the project's logger write to standard error in the form that ``FEDVEIL_LOG`` asks for.

    Raises:
        ConfigError: the variable is neither ``text`` nor ``json``.
    """
    form = os.environ.get(VARIABLE) or FORMS[0]
    one_of(FORMS, **{VARIABLE: form})
    logger = logging.getLogger("fedveil")
    handler = next((h for h in logger.handlers if isinstance(h, _StandardError)), None)
    if handler is None:
        handler = _StandardError()
        logger.addHandler(handler)
    handler.setFormatter(JsonLines() if form == "json" else TextLines())
    logger.propagate = False  # libraries, absl for one, put handlers of their own on the root
    logger.setLevel(logging.INFO)


@contextmanager
def shown_otherwise(level: int = logging.WARNING) -> Iterator[None]:
    """Keep from standard error, until the block ends, all but the sites' lines from ``level`` on; no refusal is shown.

    They are shown by who follows the run's folder, and are kept there in any case.
    """
    set_up()
    (handler,) = (one for one in logging.getLogger("fedveil").handlers if isinstance(one, _StandardError))

    def is_left(record: logging.LogRecord) -> bool:
        return record.name == "fedveil.site" and record.levelno >= level

    handler.addFilter(is_left)
    try:
        yield
    finally:
        handler.removeFilter(is_left)


@contextmanager
def kept_in(path: Path, without: str = "") -> Iterator[None]:
    """Append the project's log lines, as JSON, to a file for as long as the context lasts.

    Args:
        path: the file.
        without: name of a logger whose lines, and those of loggers below it, are left out; empty: none.
    """
    handler = logging.FileHandler(path, encoding="utf-8", delay=True)
    if without:
        handler.addFilter(lambda record: not f"{record.name}.".startswith(f"{without}."))
    handler.setFormatter(JsonLines())
    logger = logging.getLogger("fedveil")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        handler.close()
