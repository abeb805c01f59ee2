"""Rows that a user's own code has registered in this process: for simulations alone.

A site's or a server's process goes by the rows of the installed FedVeil, whose hash policies name, and refuses to go on
where another one was registered.
"""

from __future__ import annotations

from fedveil.common.errors import ConfigError

_ROWS: list[str] = []


def note_registered(row: str) -> None:
    """Remember that a row, such as ``strategy 'mine'``, is the user's own."""
    if row not in _ROWS:
        _ROWS.append(row)


def registered_rows() -> tuple[str, ...]:
    """Return the rows of user code in this process."""
    return tuple(_ROWS)


def require_installed_rows() -> None:
    """Refuse to go on where a row of user code is registered.

    Raises:
        ConfigError: one is.
    """
    if _ROWS:
        raise ConfigError(
            f"{', '.join(_ROWS)} was registered in this process, which is for simulations alone: carry it into an "
            "installed FedVeil as a row of contrib, and start a new process"
        )
