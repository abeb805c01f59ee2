"""Pins, or a roster's hash, put into a policy file that is there; all other keys and all comments stay as they are."""

from __future__ import annotations

import io
import os
import re
import tempfile
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from fedveil.common.config.flat import Scalar
from fedveil.common.config.sections import ModelConfig
from fedveil.common.config.text import toml_value
from fedveil.common.errors import ConfigError, DataError
from fedveil.common.files import sync_folder
from fedveil.common.labels import labels_text
from fedveil.common.tasks import TASKS
from fedveil.common.toml import toml_of
from fedveil.deploy.policy_file import BUDGET_HEAD, PINS_HEAD, Pins, pins_of

T = TypeVar("T")
KINDS: dict[type, str] = {str: "text", int: "a whole number", list: "a list of texts"}
LABEL, MODEL = "each of labels", "each of models"
MODELS = "models"


def changed_pins(path: Path, task: str, columns: Mapping[str, Scalar], labels: str, max_length: int) -> Pins:
    """Return the pins of a policy file with the given ones in place of its own, and a job's defaults for the rest.

    Args:
        path: the policy, which may be missing.
        task, columns, labels, max_length: as for ``pins_of``; empty or 0: not given.

    Raises:
        ConfigError, DataError: as for ``pins_of``, or the file cannot be read.
    """
    from fedveil.client.pins import LABELS, MAX_LENGTH, TASK, keys_of

    policy = _read(path)
    task = task or _value_of(path, policy, TASK, str, ModelConfig().task)
    read = [key for key in policy if task in TASKS and key in keys_of(task) and key not in columns]
    own: dict[str, Scalar] = {
        key: policy[key] if "." in key else _value_of(path, policy, key, str, "")
        for key in read
        if key not in (TASK, LABELS, MAX_LENGTH)
    }
    if not labels and LABELS in read:
        texts = _value_of(path, policy, LABELS, list, [])
        labels = labels_text(_value_of(path, {LABEL: text}, LABEL, str, "") for text in texts)
    if not max_length:
        usual = ModelConfig().max_length
        max_length = _value_of(path, policy, MAX_LENGTH, int, usual) if MAX_LENGTH in read else usual
    return pins_of(task, own | dict(columns), labels, max_length)


def changed_models(path: Path, name: str, fingerprint: str) -> list[str]:
    """Return the ``models`` of a policy file with this base model's entry as the only one of its name.

    Args:
        path: the policy, which may be missing.
        name, fingerprint: as ``model.name``, and FINGERPRINT+FILES from the coordinator.

    Raises:
        ConfigError: the policy's ``models`` is no list of texts.
        DataError: the file cannot be read.
    """
    policy = _read(path)
    others = [_value_of(path, {MODEL: text}, MODEL, str, "") for text in _value_of(path, policy, MODELS, list, [])]
    return [entry for entry in others if entry.rpartition("=")[0] != name] + [f"{name}={fingerprint}"]


def _read(path: Path) -> dict[str, Any]:
    try:
        return _flat_toml(path.read_text(encoding="utf-8-sig")) if path.exists() else {}
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise DataError(f"cannot change {path}: {' '.join(str(error).split())}") from error


def _flat_toml(text: str) -> dict[str, Any]:
    """Return the values of a policy's text; those of a section, as a task's options are, under dotted keys."""
    flat: dict[str, Any] = {}
    for name, value in toml_of(text).items():
        flat |= {f"{name}.{key}": own for key, own in value.items()} if isinstance(value, Mapping) else {name: value}
    return flat


def _value_of(path: Path, policy: Mapping[str, Any], key: str, kind: type[T], usual: T) -> T:
    """Return what a policy has under a key, or ``usual`` where it has nothing; ConfigError if that is no ``kind``."""
    value = policy.get(key, usual)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ConfigError(f"the policy {path}: {key} must be {KINDS[kind]}, not {value!r}: fix it, or say what it is")
    return value


def pin(path: Path, pins: Pins, more: Pins | None = None) -> None:
    """Replace the pins of a policy file, which is made if missing; all its other keys and all comments stay.

    Args:
        path: of the policy.
        pins: what the records are for.
        more: new values of ``epsilon``, ``delta`` and ``models``.

    Raises:
        ConfigError: the file is no policy, or would be none with these pins, or is missing and not named ``.toml``;
            nothing was changed.
        DataError: it cannot be read or written.
    """
    from fedveil.client.pins import pin_keys

    if not path.exists() and path.suffix != ".toml":
        raise ConfigError(f"there is no site's folder or policy {path}: a new policy's name ends in .toml")
    models = {key: value for key, value in (more or {}).items() if key == MODELS}
    budget = {key: value for key, value in (more or {}).items() if key != MODELS}
    _put(path, (budget, list(budget), BUDGET_HEAD), (models, list(models), ""), (pins, pin_keys(), PINS_HEAD))


def pin_roster(path: Path, digest: str) -> None:
    """Put a roster's hash into a policy file in place of the one that it has.

    For one machine that plays all stewards. A steward compares the hash with the others' first.

    Raises:
        ConfigError, DataError: as for pin.
    """
    _put(path, ({"peers-hash": digest}, ["peers-hash"], ""))


def _put(path: Path, *parts: tuple[Pins, Sequence[str], str]) -> None:
    """Put each part's values in place of all of its keys, with its head over them where none was there.

    Errors as for pin.
    """
    from fedveil.client.policy_file import parse_policy

    keys = {key for _, own, _ in parts for key in own}
    try:
        after = before = path.read_text(encoding="utf-8-sig") if path.exists() else ""
        others = {key: value for key, value in _flat_toml(before).items() if key not in keys}
        for values, own, head in parts:
            after = _with_pins(after, values, own, head)
        parse_policy(after, path)
        if {key: value for key, value in _flat_toml(after).items() if key not in keys} != others:
            raise ConfigError(f"{path} is written in a way that this command does not understand: add the pins by hand")
        # Where a link names the steward's own file, that one rules, and is what the steward goes on to read.
        _replace(Path(os.path.realpath(path)), after)
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise DataError(f"cannot change {path}: {' '.join(str(error).split())}") from error


def _with_pins(text: str, pins: Pins, keys: Sequence[str], head: str) -> str:
    """Return a policy's text with ``pins`` and without any other of ``keys``."""
    lines, rest, found = list(io.StringIO(text)), list[str](), set[str]()
    while lines:
        key, length = _pin_at(lines, keys)
        taken, lines = lines[:length], lines[length:]
        # By their text: true and 1.0 are equal to 1, and no whole number.
        if not key or (key in pins and toml_value(_flat_toml("".join(taken))[key]) == toml_value(pins[key])):
            rest += taken
        else:
            rest += [f"{comment}\n" for comment in _comments("".join(taken))]
            rest += [f"{key} = {toml_value(pins[key])}\n"] if key in pins else []
        found.add(key)
    added = "".join(f"{key} = {toml_value(value)}\n" for key, value in pins.items() if key not in found)
    whole = "".join(rest)
    gap = "\n" if whole and not whole.endswith("\n") else ""
    return whole + gap + ((head if not found & set(keys) else "") + added if added else "")


def _pin_at(lines: Sequence[str], keys: Sequence[str]) -> tuple[str, int]:
    """Return the pin that the first line begins with, if any, and how many lines that takes."""
    match = re.match(r"""\s*["']?([A-Za-z0-9.-]+)["']?\s*=""", lines[0])
    for length in range(1, len(lines) + 1 if match else 1):
        try:
            value = _flat_toml("".join(lines[:length]))
        except tomllib.TOMLDecodeError:
            continue  # a list may go on in the next line
        (key,) = value
        return (key if key in keys else ""), length
    return "", 1


def _comments(text: str) -> list[str]:
    """Return the comments in the text of one key: what can go without changing its value."""
    value, comments, start = toml_of(text), list[str](), 0
    while (start := text.find("#", start)) >= 0:
        end = start + len(text[start:].partition("\n")[0])
        try:
            free = toml_of(text[:start] + text[end:]) == value
        except tomllib.TOMLDecodeError:
            free = False
        if free:
            comments.append(text[start:end].rstrip())
        start = end if free else start + 1
    return comments


def _replace(path: Path, text: str) -> None:
    """Write a policy beside its place and put it there; its mode stays, and its owner where root writes.

    A new one is the caller's alone.
    """
    earlier = path.stat() if path.exists() else None
    handle, draft = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.absolute().parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            if earlier and os.geteuid() == 0:  # a policy of root's own is none that the site can read
                os.fchown(file.fileno(), earlier.st_uid, earlier.st_gid)
            os.fchmod(file.fileno(), earlier.st_mode & 0o777 if earlier else 0o600)
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(draft).replace(path)
        sync_folder(path.absolute().parent)
    except BaseException:  # Ctrl-C as well: a half-written policy stays in nobody's folder
        Path(draft).unlink(missing_ok=True)
        raise
