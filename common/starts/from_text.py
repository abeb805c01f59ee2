"""A start that the server makes from public text, which costs nothing and which every site knows by its hash."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Self

from common.adapters import Adapter
from common.check import POSITIVE, Digits
from common.config.fields import Unit
from common.config.sections import RunConfig
from common.errors import ConfigError
from common.model.federated import FederatedModel
from common.starts.base import Needs, Start
from common.starts.public_text import MADE_UP, PACKAGED, packaged_sha256, read_text
from common.tasks import TASKS, Record


@dataclass(frozen=True)
class FromText(Start):
    """A start from a public text of the server's."""

    needs: ClassVar[Needs] = "public records"
    suits: ClassVar[str] = PACKAGED
    """What ``auto`` stands for."""

    text: str = "auto"
    """The public text: ``phrases``, which come with FedVeil, ``made-up`` (words drawn from the model's vocabulary), or
    a file of the server's, one text a line; ``auto``: what suits the start."""
    text_sha256: Annotated[str, Digits(64, "sha256sum")] = ""
    """SHA-256 of a file's bytes."""
    records: Annotated[int, POSITIVE, Unit("records")] = 256
    """How many texts are used, from the first on."""

    def check(self, config: RunConfig, adapter: type[Adapter]) -> None:
        """Refuse a file without its fingerprint, and records that hold no words."""
        super().check(config, adapter)
        if self.text not in ("auto", PACKAGED, MADE_UP) and not self.text_sha256:
            raise ConfigError(
                f"start.text {self.text!r} is a file of the server's: set start.text-sha256 to what sha256sum prints "
                "for it, so that every site knows which text the run starts from"
            )
        if not TASKS[config.model.task].worded:
            raise ConfigError(
                f"adapter.start {self.name!r} is made from text, and model.task {config.model.task!r} has none"
            )

    def resolved(self) -> Self:
        """Return the start with its text, and the fingerprint of packaged phrases; a file's has to be given."""
        text = self.suits if self.text == "auto" else self.text
        return replace(self, text=text, text_sha256=packaged_sha256() if text == PACKAGED else self.text_sha256)

    @property
    def fingerprint(self) -> str:
        """The SHA-256 of the public text; empty: it is made up."""
        found = self.resolved()
        return "" if found.text == MADE_UP else found.text_sha256

    def texts(self, model: FederatedModel, labels: Sequence[int] = ()) -> list[Record]:
        """Return the texts as the model takes them, each of its label, or all of the first one.

        Made-up ones have 6 to 40 tokens, or as many as the run cuts records to.

        Raises:
            DataError: they cannot be read, or are not those of the fingerprint.
        """
        given = labels or [0] * self.records
        text = self.resolved().text
        if text == MADE_UP:
            invent = model.reading.inventor(model.base, model.max_length)
            sizes = [min(model.max_length, 6 + 7 * i % 35) for i in range(self.records)]
            return [invent(size, i, label) for i, (size, label) in enumerate(zip(sizes, given, strict=True))]
        texts = read_text(text, self.fingerprint)[: self.records]
        return model.prepare([replace(model.task.of_phrase(t), label=i) for t, i in zip(texts, given, strict=False)])
