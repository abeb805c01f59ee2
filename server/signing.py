"""The server's signatures on tasks, and its check of the sites' on answers, where ``fedveil server start`` began it.

Elsewhere, as in a simulation, nothing is signed, and only Flower says who has sent a task or an answer.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fedveil.common.config.flat import Scalar
from fedveil.common.errors import DataError
from fedveil.common.messages.signed import Asked, certificate_der, is_answer, sign_task
from fedveil.privacy.secure_sum.identity import Identity
from fedveil.server.own_check import FOLDER
from fedveil.server.registered import key_of

if TYPE_CHECKING:
    from flwr.app import RecordDict

TASKS = "tasks.pem"
"""File of the server's folder with the key that signs tasks, and its certificate."""
CERTIFICATE = b"-----BEGIN CERTIFICATE-----"


@dataclass(frozen=True)
class Signing:
    """What one run's messages are signed with and checked by."""

    run: str
    """The run's number at the SuperLink."""
    settings: Mapping[str, Scalar]
    """Of the run, as Flower gives them to server and sites."""
    key: Identity
    certificate: bytes
    """Of the key, DER."""

    def sign(self, record: RecordDict, node: int) -> bytes:
        """Sign a task for a node, and return the digest by which its answer names it."""
        return sign_task(record, Asked(self.run, self.settings, node), self.key, self.certificate)

    def fault(self, record: RecordDict, task: bytes, node: int) -> str:
        """Return why a message is not the node's answer to the task of this digest; empty if it is.

        Raises:
            DataError: the folder of registered keys cannot be read.
        """
        public = key_of(node)
        if not public:
            return "the server's folder has no key of this node: let it in with 'fedveil server register'"
        return (
            "" if is_answer(record, task, public) else "it is not signed by this site's key as the answer to its task"
        )


def signing_of(run: str, settings: Mapping[str, Scalar]) -> Signing | None:
    """Return what a run is signed with, by the folder that the SuperLink was started from; None if it names none.

    Raises:
        DataError: the folder has no key that signs tasks.
    """
    folder = os.environ.get(FOLDER)
    return Signing(run, settings, *read_tasks_key(Path(folder))) if folder else None


def read_tasks_key(folder: Path) -> tuple[Identity, bytes]:
    """Return the key of a server's folder that signs tasks, and its certificate (DER).

    Raises:
        DataError: the file is missing or damaged.
    """
    path = folder / TASKS
    try:
        key, mark, certificate = path.read_bytes().partition(CERTIFICATE)
        return Identity.from_pem(key), certificate_der(mark + certificate)
    except (OSError, ValueError, DataError) as error:
        raise DataError(
            f"the key that signs tasks cannot be read from {path}: renew it with 'fedveil server renew'"
        ) from error
