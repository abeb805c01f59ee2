"""Public text for starts: what comes with FedVeil, the sentences of a named data set, or a file of the server's.

No site ever opens a file or a data set that a run's settings name as public text. It knows the text by its fingerprint,
which is part of the settings and of what a task must agree with. Of a data set the sentences alone are read, no label.

Public text is no person's record. The text alone does not show that, so the coordinator declares it. What can be
checked is checked in every run: the text is no data set of the run's own, and none of it is among the test records, nor
among those that the run's ``data.name`` holds (``common.data.sentences.traces``).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache

from fedveil.common.config.sections import DataConfig
from fedveil.common.data import prose
from fedveil.common.data.named import DATASETS, share_sentences
from fedveil.common.data.phrases import SENTIMENT
from fedveil.common.data.read_named import load_texts
from fedveil.common.data.sentences import FEWEST_WORDS, likeness, sentences_of, traces
from fedveil.common.data.sources import public_test, train_and_test
from fedveil.common.errors import ConfigError, DataError
from fedveil.common.files import expanded
from fedveil.common.tasks.examples import Example

PACKAGED = "phrases"
"""What ``start.text`` calls the phrases that come with FedVeil."""
OWN_PROSE = "prose"
"""What it calls the sentences of FedVeil's own documents."""
SHIPPED = (PACKAGED, OWN_PROSE)
"""The texts that come with FedVeil."""
MADE_UP = "made-up"
"""What it calls words drawn from the base model's vocabulary, or textures where records are images: no person's."""
OF_NO_ONE = (*SHIPPED, MADE_UP)
"""Texts that are in no source of records."""


def shipped(source: str) -> tuple[str, ...]:
    """Return a text of ``SHIPPED``; DataError where its file is missing or altered."""
    return prose.prose() if source == OWN_PROSE else tuple(phrase for phrases in SENTIMENT for phrase in phrases)


def known_sha256(source: str) -> str:
    """Return the SHA-256 of a text that FedVeil knows, in hexadecimal; empty: the setting must give it."""
    if source == OWN_PROSE:
        return prose.SHA256
    if source == PACKAGED:
        return hashlib.sha256(as_file(shipped(source))).hexdigest()
    return DATASETS[source].sentences_sha256 if source in DATASETS else ""


def check_named(source: str, sha256: str, data: DataConfig) -> None:
    """Raise ConfigError if a run on ``data`` may not start from a text, as far as names tell; reads nothing.

    Args:
        source: the setting ``start.text``.
        sha256: its fingerprint; empty: it has none.
        data: the run's records.
    """
    for key, name in (("data.name", data.name), ("data.test", data.test)):
        if source == name:
            raise ConfigError(
                f"start.text and {key} are both {source!r}, whose sentences would then not be public: name another "
                "text, or leave start.text at 'auto'"
            )
        if share_sentences(source, name):
            raise ConfigError(
                f"start.text {source!r} shares sentences with {key} {name!r}, so it is no public text for it: name "
                "another, or leave start.text at 'auto'"
            )
    if source in DATASETS and DATASETS[source].is_folder:
        raise ConfigError(f"start.text {source!r} holds no words: name another text, or leave it at 'auto'")
    if source not in OF_NO_ONE and not sha256:
        if source in DATASETS:
            raise ConfigError(
                f"start.text {source!r} is a data set whose sentences have no known hash: set start.text-sha256 to "
                f"what `python -m fedveil.demo.convert sentences {source} FILE` prints"
            )
        raise ConfigError(
            f"start.text {source!r} is a file of the server's: set start.text-sha256 to what sha256sum prints "
            "for it, so that every site knows which text the run starts from"
        )


def words_of(source: str, sha256: str) -> str:
    """Return in words which public text a start was made from, and who says that it is public.

    >>> words_of("made-up", "")
    'none: made-up records'
    """
    if source == MADE_UP:
        return "none: made-up records"
    if source in SHIPPED:
        return f"{source} that comes with FedVeil, SHA-256 {sha256}"
    return (
        f"{source!r}, SHA-256 {sha256}. The coordinator says that it is public; it shares no sentence with the test "
        "set, nor with the records of data.name where the server had them"
    )


def read_text(source: str, sha256: str) -> list[str]:
    """Return the texts of a source, in its order, without empty lines.

    Args:
        source: ``phrases``, ``prose``, a named data set, or a file in UTF-8.
        sha256: of the source's bytes, in hexadecimal; of a data set's sentences as a file with one a line.

    Raises:
        DataError: there is no such source, it holds no text, or its SHA-256 is another.
    """
    try:
        if source in DATASETS:
            content = as_file(data_set_sentences(source))
        else:
            content = as_file(shipped(source)) if source in SHIPPED else expanded(source).read_bytes()
        texts = [line.strip() for line in content.decode("utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"start.text {source!r} cannot be read as UTF-8 text: name a file with a text a line"
        ) from error
    digest = hashlib.sha256(content).hexdigest()
    if digest != sha256:
        raise DataError(f"start.text {source!r} has the SHA-256 {digest}, start.text-sha256 is {sha256}: correct one")
    if not texts:
        raise DataError(f"start.text {source!r} holds no text: name a file with a text a line")
    return texts


@lru_cache(maxsize=1)
def data_set_sentences(name: str) -> tuple[str, ...]:
    """Return the sentences of a named data set that are long enough to tell, each once.

    They are mixed by their own hash, so that the first of them are a sample of all, in whatever order records lie.

    Raises:
        DataError: the data set cannot be read.
    """
    sentences = {
        likeness(s): s for text in load_texts(name) for s in sentences_of(text) if len(s.split()) >= FEWEST_WORDS
    }
    return tuple(sorted(sentences.values(), key=lambda sentence: hashlib.sha256(sentence.encode()).digest()))


def as_file(texts: Sequence[str]) -> bytes:
    """Return texts as the bytes of a file, one a line."""
    return "".join(f"{text}\n" for text in texts).encode()


def check_apart(source: str, texts: Sequence[str], data: DataConfig, task: str, setting: str = "start.text") -> str:
    """Refuse public text that is among a run's records; return in words what it was compared with.

    In a simulation the sites' records are those of ``data.name``, and so are a deployed site's that plays a part of it.
    What a site brings itself no server sees: there the text is public because the coordinator says so.

    Args:
        source: what the setting names.
        texts: those of it that are used.
        data: the run's records.
        task: kind of task, as ``model.task``.
        setting: by which ``source`` was named.

    Raises:
        DataError: some of the text is in the public test part, or in ``data.name``; or no test record can be read.
    """
    named = f"{setting} {source!r}"
    if setting == "start.text" and source in DATASETS:
        out = (
            f"take them out of a file that `python -m fedveil.demo.convert sentences {source} FILE` writes and name it"
        )
    else:
        out = "take them out"
    _refuse(named, out, texts, public_test(data, task).examples, "the public test part")
    try:
        train, _ = train_and_test(data, task)
    except DataError:  # as at the server of sites that bring their own, which needs no data.name beside data.test
        return "compared with the public test part alone"
    _refuse(named, out, texts, train.examples, f"the records of data.name {data.name!r}, which sites divide")
    return f"compared with the public test part and the records of data.name {data.name!r}"


def _refuse(named: str, out: str, texts: Sequence[str], examples: Sequence[Example], where: str) -> None:
    known = {trace for example in examples for text in example.texts() for trace in traces(text)}
    shared = [text for text in texts if not known.isdisjoint(traces(text))]
    if shared:
        shown = shared[0] if len(shared[0]) <= 60 else f"{shared[0][:57]}..."
        raise DataError(
            f"{len(shared)} of the {len(texts)} texts of {named} stand in {where}, such as {shown!r}: "
            f"they are not public to this run; {out}, or name another"
        )
