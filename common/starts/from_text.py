"""A start that the server makes from public text, which costs nothing and which every site knows by its hash."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, ClassVar, Self

from fedveil.common.adapters import Adapter
from fedveil.common.check import POSITIVE, Digits
from fedveil.common.config.fields import Unit
from fedveil.common.config.run import RunConfig
from fedveil.common.errors import ConfigError
from fedveil.common.starts.base import Needs, Start
from fedveil.common.starts.public_text import (
    MADE_UP,
    OF_NO_ONE,
    PACKAGED,
    SHIPPED,
    check_apart,
    check_named,
    known_sha256,
    read_text,
)
from fedveil.common.tasks import TASKS, Record, wording_of
from fedveil.common.tasks.text import TOKENS

if TYPE_CHECKING:
    from fedveil.common.model.federated import FederatedModel


@dataclass(frozen=True)
class FromText(Start):
    """A start from a public text of the server's."""

    needs: ClassVar[Needs] = "public records"
    suits: ClassVar[str] = PACKAGED
    """The value of ``auto``."""

    text: str = "auto"
    """The public text: ``phrases`` or ``prose``, which come with FedVeil, ``made-up`` (words drawn from the model's
    vocabulary, or textures where records are images), the name of a data set, of which the sentences are taken, or a
    file of the server's, one text a line; ``auto``: what suits the start. A text that is among the run's own
    records is refused."""
    text_sha256: Annotated[str, Digits(64, "sha256sum")] = ""
    """SHA-256 of a file's bytes; of a data set's sentences where FedVeil does not know it."""
    records: Annotated[int, POSITIVE, Unit("records")] = 256
    """How many texts are used, from the first on."""

    def check(self, config: RunConfig, adapter: type[Adapter]) -> None:
        """Refuse a text that is not public to the run or has no fingerprint, and records that hold no words."""
        super().check(config, adapter)
        start = self.resolved()
        known = known_sha256(start.text)
        if known and start.text_sha256 != known:
            raise ConfigError(
                f"start.text-sha256 is {start.text_sha256}, that of the sentences of {start.text!r} is {known}: leave "
                "it empty, or name a file as start.text"
            )
        check_named(start.text, start.text_sha256, config.data)
        if start.text != MADE_UP and not TASKS[config.model.task].wording:
            raise ConfigError(
                f"start.text is {start.text!r}, and the records of model.task {config.model.task!r} hold no words: set "
                "start.text to 'made-up'"
            )

    def resolved(self) -> Self:
        """Return the start with its text and the fingerprint of that; a file's has to be given."""
        text = self.suits if self.text == "auto" else self.text
        given = "" if text in SHIPPED else self.text_sha256
        return replace(self, text=text, text_sha256=given or known_sha256(text))

    @property
    def fingerprint(self) -> str:
        """The SHA-256 of the public text; empty: it is made up."""
        start = self.resolved()
        return "" if start.text == MADE_UP else start.text_sha256

    def check_public(self, config: RunConfig) -> str:
        """Refuse a text that is among the run's records, and say what it was compared with."""
        start = self.resolved()
        if start.text in OF_NO_ONE:
            return ""
        used = read_text(start.text, start.fingerprint)[: self.records]
        compared = check_apart(start.text, used, config.data, config.model.task)
        return f"the text is public by the coordinator's word; it was {compared}"

    def texts(self, model: FederatedModel, labels: Sequence[int] = ()) -> list[Record]:
        """Return the texts as the model takes them, each of its label, or all of the first one.

        Made-up ones have 6 to 40 tokens, or as many as the run cuts records to.

        Raises:
            DataError: they cannot be read, or are not those of the fingerprint.
        """
        given = labels or [0] * self.records
        text = self.resolved().text
        if text == MADE_UP:
            invent = model.task.inventor(model.base, model.max_length, lifelike=True)
            sizes = [min(model.max_length, 6 + 7 * i % 35) for i in range(self.records)]
            return [invent(size, i, label) for i, (size, label) in enumerate(zip(sizes, given, strict=True))]
        texts = read_text(text, self.fingerprint)[: self.records]
        return model.prepare(
            [replace(wording_of(model.task).phrase(t), label=i) for t, i in zip(texts, given, strict=False)]
        )

    def pairs(self, model: FederatedModel, labels: Sequence[int]) -> list[Record]:
        """Return each text with the next one as a pair, of its label; errors as in ``texts``.

        Made-up ones are words as the tokenizer spells its tokens, so that a pair is put together as any other.
        """
        text = self.resolved().text
        if text == MADE_UP:
            invent = model.task.inventor(model.base, model.max_length, lifelike=True)
            sizes = [min(max(1, model.max_length // 2 - 2), 6 + 7 * i % 35) for i in range(self.records)]
            texts = [model.base.processor.decode(invent(size, i, 0)[TOKENS]) for i, size in enumerate(sizes)]
        else:
            texts = read_text(text, self.fingerprint)[: self.records]
        both = zip(texts, [*texts[1:], *texts[:1]], labels, strict=False)
        return model.prepare([replace(wording_of(model.task).pair(a, b), label=label) for a, b, label in both])

    def completions(self, model: FederatedModel) -> list[Record]:
        """Return the texts as prompts and completions; errors as in ``texts``."""
        text = self.resolved().text
        if text == MADE_UP:
            return self.texts(model)
        return model.prepare(
            [wording_of(model.task).text(t) for t in read_text(text, self.fingerprint)[: self.records]]
        )
