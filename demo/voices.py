"""Spoken digits and short sentences by espeak-ng's voices: made-up speech of no one's, each voice for a site.

    python -m fedveil.demo.voices            # writes data/voices

It needs espeak-ng (Debian: ``apt-get install espeak-ng``) and takes a minute or two. ``digits.csv`` has the digits that
all but two voices speak, ``digits-test.csv`` those of the two; of ``sentences-test.csv`` the two read sentences that
no other voice reads. Columns: file, voice, label or text.
"""

from __future__ import annotations

import argparse
import csv
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedveil.common.errors import DataError, FedVeilError

PROGRAM = "espeak-ng"
FOLDER = Path("data/voices")
VOICES = (
    *("en-us+m1", "en-us+f2", "en-us+m7", "en+f1", "en+m3", "en-gb-x-rp+m2", "en-gb-x-rp+f4"),
    *(
        "en-gb-scotland+m4",
        "en-gb-scotland+f3",
        "en-029+m5",
        "en-029+f5",
        "en-us-nyc+m6",
        "en-gb-x-gbcwmd+m8",
        "en-us+f4",
    ),
)
"""Accents and speakers that train."""
HELD_OUT = ("en+whisper", "en-us+croak")
"""Those that are only scored."""
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SPEEDS, PITCHES = (120, 140, 160, 180, 200), (25, 40, 55, 70)
"""Of each digit's takes: words a minute, and pitch from 0 to 99."""
SUBJECTS = (
    *("The patient", "My brother", "Our nurse", "The old man", "This child"),
    *("Her sister", "The driver", "A friend", "The doctor", "His mother"),
)
PREDICATES = (
    *("slept well last night", "has pain in the left knee", "asked for a glass of water", "wants to go home today"),
    *("forgot the blue folder", "called the office this morning", "coughs more in the evening", "lost the small key"),
    *("felt dizzy on the train", "paid the bill in cash", "broke a finger at work", "drinks tea without sugar"),
    *("read the letter aloud", "waited an hour for help", "washed both hands twice", "moved to a quiet street"),
)
TEST_PREDICATES = (
    *("walks slowly down the stairs", "needs a new bandage", "left the door open", "took the tablets after dinner"),
)


@dataclass(frozen=True)
class Clip:
    """One clip that is to be made."""

    voice: str
    words: str
    answer: str
    """What the table has of it: a digit's name, or the words."""
    speed: int = 160
    pitch: int = 50


def digits(voices: Sequence[str]) -> Iterator[Clip]:
    """Yield every digit by every voice, at each speed and pitch."""
    for voice in voices:
        yield from (Clip(voice, digit, digit, s, p) for digit in DIGITS for s in SPEEDS for p in PITCHES)


def sentences(voices: Sequence[str], predicates: Sequence[str]) -> Iterator[Clip]:
    """Yield every subject with every predicate by every voice."""
    for voice in voices:
        for said in (f"{subject} {predicate}." for subject in SUBJECTS for predicate in predicates):
            yield Clip(voice, said, said)


def make(clips: Sequence[Clip], folder: Path, name: str, column: str) -> Path:
    """Make clips below ``folder/name`` and the table of them beside that; return the table.

    Raises:
        DataError: espeak-ng is not installed, or cannot speak.
    """
    program = shutil.which(PROGRAM)
    if program is None:
        raise DataError(f"{PROGRAM} is not installed, which speaks the clips: apt-get install {PROGRAM}")
    (folder / name).mkdir(parents=True, exist_ok=True)
    rows = []
    for number, clip in enumerate(clips):
        file = f"{name}/{number:04}.wav"
        how = [
            "-v",
            clip.voice,
            "-s",
            str(clip.speed),
            "-p",
            str(clip.pitch),
            "-w",
            str(folder / file),
            "--",
            clip.words,
        ]
        done = subprocess.run([program, *how], capture_output=True, text=True, check=False)
        if done.returncode or not (folder / file).is_file():
            said = next(iter(done.stderr.strip().splitlines()), f"exit status {done.returncode}")
            raise DataError(f"{PROGRAM} does not speak as {clip.voice} ({said}): install its voices, espeak-ng-data")
        rows.append((file, clip.voice, clip.answer))
    table = folder / f"{name}.csv"
    with table.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([("file", "voice", column), *rows])
    return table


def main() -> int:
    """Make all sets; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=FOLDER)
    folder = parser.parse_args().folder
    try:
        for name, clips, column in (
            ("digits", digits(VOICES), "label"),
            ("digits-test", digits(HELD_OUT), "label"),
            ("sentences", sentences(VOICES, PREDICATES), "text"),
            ("sentences-test", sentences(HELD_OUT, TEST_PREDICATES), "text"),
        ):
            print(make(list(clips), folder, name, column))
    except FedVeilError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
