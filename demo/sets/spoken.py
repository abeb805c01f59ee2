"""Spoken digits and sentences: made by espeak-ng's voices (``fedveil.demo.voices``), or recorded.

FSDD is the Free Spoken Digit Dataset (Jackson et al.; CC BY-SA 4.0): 3,000 digits by six speakers. A file's name has
the digit, who speaks, and a number.
"""

from __future__ import annotations

from pathlib import Path

from fedveil.common.data.named import NamedDataset, UserFile
from fedveil.common.errors import UnreadableFile
from fedveil.common.tasks.tables import Table
from fedveil.demo.voices import DIGITS, FOLDER

MADE = "`python -m fedveil.demo.voices` makes with espeak-ng (apt-get install espeak-ng)"


def read_fsdd(folder: Path) -> Table:
    """Return the clips of FSDD's recordings with their digits and speakers, in the order of their names.

    Raises:
        UnreadableFile: a file's name is no digit, speaker and number.
    """
    files = sorted(path.name for path in folder.glob("*.wav"))
    parts = [name.removesuffix(".wav").split("_") for name in files]
    odd = next((name for name, of in zip(files, parts, strict=True) if len(of) != 3 or not of[0].isdecimal()), "")
    if odd or not files:
        raise UnreadableFile(f"{folder} has {odd or 'no clip'}, and clips are called as 7_jackson_32.wav")
    digit, speaker, _ = zip(*parts, strict=True)
    return Table(str(folder), {"file": files, "label": list(digit), "voice": list(speaker)}, folder=folder)


def _spoken_digits(name: str, file: str) -> NamedDataset:
    return NamedDataset(
        name=name,
        file=UserFile(f"{FOLDER.as_posix()}/{file}.csv", MADE),
        task="audio-classification",
        fields={"audio": "{file}"},
        label="label",
        labels={digit: digit for digit in DIGITS},
    )


def _sentences(name: str, file: str) -> NamedDataset:
    return NamedDataset(
        name=name,
        file=UserFile(f"{FOLDER.as_posix()}/{file}.csv", MADE),
        task="speech-to-text",
        fields={"audio": "{file}", "text": "{text}"},
    )


SPOKEN_DIGITS, SPOKEN_DIGITS_TEST = (
    _spoken_digits("spoken-digits", "digits"),
    _spoken_digits("spoken-digits-test", "digits-test"),
)
SPOKEN_SENTENCES, SPOKEN_SENTENCES_TEST = (
    _sentences("spoken-sentences", "sentences"),
    _sentences("spoken-sentences-test", "sentences-test"),
)
FSDD = NamedDataset(
    name="fsdd",
    file=UserFile("data/fsdd", "is the folder recordings of github.com/Jakobovski/free-spoken-digit-dataset"),
    task="audio-classification",
    fields={"audio": "{file}"},
    label="label",
    labels={str(number): digit for number, digit in enumerate(DIGITS)},
    read=read_fsdd,
)
