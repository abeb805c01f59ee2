"""A start that the server makes from public text, which costs nothing and which every site knows by its hash."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

from common.adapters import Adapter
from common.check import positive
from common.config.sections import RunConfig
from common.errors import ConfigError
from common.model.federated import FederatedModel
from common.starts.base import Needs, Start
from common.starts.public_text import PACKAGED, packaged_sha256, read_text
from common.tasks import TASKS, Record


@dataclass(frozen=True)
class FromText(Start):
    """A start from a public text of the server's."""

    needs: ClassVar[Needs] = "public records"

    text: str = PACKAGED
    """The public text: ``phrases``, which come with FedVeil, or a file of the server's, one text a line."""
    text_sha256: str = ""
    """Of that text's bytes, in hexadecimal; empty: of the packaged phrases."""
    records: int = 256
    """How many texts are used, from the first on."""

    def __post_init__(self) -> None:
        positive(start__records=self.records)
        if self.text_sha256 and not re.fullmatch("[0-9a-f]{64}", self.text_sha256):
            raise ConfigError(
                f"start.text-sha256 must be 64 hexadecimal digits, as sha256sum prints them, not {self.text_sha256!r}"
            )

    def check(self, config: RunConfig, adapter: type[Adapter]) -> None:
        """Refuse a file without its fingerprint, and records that hold no words."""
        super().check(config, adapter)
        if self.text != PACKAGED and not self.text_sha256:
            raise ConfigError(
                f"start.text {self.text!r} is a file of the server's: set start.text-sha256 to what sha256sum prints "
                "for it, so that every site knows which text the run starts from"
            )
        if not TASKS[config.model.task].worded:
            raise ConfigError(
                f"adapter.start {self.name!r} is made from text, and model.task {config.model.task!r} has none"
            )

    def resolved(self) -> Self:
        """Return the start with the fingerprint of its text, which of a file has to be given."""
        if self.text_sha256 or self.text != PACKAGED:
            return self
        return replace(self, text_sha256=packaged_sha256())

    @property
    def fingerprint(self) -> str:
        """The SHA-256 of the public text."""
        return self.resolved().text_sha256

    def texts(self, model: FederatedModel, labels: Sequence[int] = ()) -> list[Record]:
        """Return the texts as the model takes them, each of its label, or all of the first one.

        Raises:
            DataError: they cannot be read, or are not those of the fingerprint.
        """
        texts = read_text(self.text, self.fingerprint)[: self.records]
        given = labels or [0] * len(texts)
        return model.prepare([replace(model.task.of_phrase(t), label=i) for t, i in zip(texts, given, strict=False)])
