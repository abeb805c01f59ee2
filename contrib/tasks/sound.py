"""Clips as cells of a table hold them.

A cell holds a WAV file's bytes, or its path below the table's folder. Only plain PCM is decoded, by the standard
library. A clip's identity is its samples: in more bits, or with other chunks beside them, it is the same.
"""

from __future__ import annotations

import hashlib
import io
import wave
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, cast

from fedveil.common.errors import DataError
from fedveil.common.tasks.cell_files import MOST_BYTES, content_of
from fedveil.common.tasks.cells import Misfit

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

AUDIO = "audio"
"""Column of a folder of clips."""
SUFFIXES = (".wav",)
RATES = range(1000, 384_001)
"""Samples a second of a clip that is decoded."""
_BYTES = 4
"""Of a decoded sample."""


@dataclass(frozen=True, slots=True)
class Sound:
    """A clip that can be decoded."""

    samples: str
    """SHA-256 of its rate, its channels and its samples in 32 bits, in hexadecimal."""
    content: bytes = field(compare=False, repr=False)
    """The file as it was read."""


def read_sound(value: object, folder: Path | None = None) -> Sound:
    """Return the clip of a cell: a file's bytes, a path below ``folder``, or as the hub has it, ``{"bytes": ...}``.

    Raises:
        Misfit: there is no clip, or none that can be decoded.
    """
    content = content_of(value, folder)
    rate, samples = _samples(content)
    whole = f"{rate}x{samples.shape[1]}:".encode() + samples.tobytes()
    return Sound(hashlib.sha256(whole).hexdigest(), content)


def sound_of(path: str) -> Sound:
    """Return the clip in the file of a path; DataError if it cannot be read."""
    try:
        return read_sound(Path(path).read_bytes())
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): check the path") from error
    except Misfit as misfit:
        raise DataError(f"{path} {misfit.what}: {misfit.advice}") from misfit


def waveform(sound: Sound, rate: int, seconds: int) -> NDArray[np.float32]:
    """Return a clip's first seconds, the mean of its channels, at ``rate`` samples a second, from -1 to 1, float32.

    It is resampled by its spectrum, without what the new rate has no room for.
    """
    import numpy as np

    own, samples = _samples(sound.content)
    mono = samples[: seconds * own].mean(1) / 2.0**31
    if own != rate:
        length = max(1, round(len(mono) * rate / own))
        mono = np.fft.irfft(np.fft.rfft(mono), length) * (length / len(mono))
    return cast("NDArray[np.float32]", mono.astype(np.float32))


def _samples(content: bytes) -> tuple[int, NDArray[np.int32]]:
    """Return a WAV file's samples a second, and its samples in 32 bits, shape (samples, channels)."""
    import numpy as np

    if len(content) > MOST_BYTES:
        raise Misfit(f"has a clip of more than {MOST_BYTES >> 20} MiB", "cut it into shorter ones")
    try:
        with wave.open(io.BytesIO(content)) as file:
            rate, channels, width, count = (
                file.getframerate(),
                file.getnchannels(),
                file.getsampwidth(),
                file.getnframes(),
            )
            raw = np.frombuffer(file.readframes(count), np.uint8).reshape(-1, width)
    except Exception:  # whatever a broken file leads the library to; its words might quote the file
        raise Misfit("has a clip that cannot be decoded", "save it again as a WAV file (PCM)") from None
    if rate not in RATES:
        raise Misfit(f"has a clip of fewer than {RATES.start} or more than {RATES.stop - 1} samples a second")
    if not count or len(raw) != count * channels:
        raise Misfit("has a clip that is empty or cut short", "save it again as a WAV file (PCM)")
    wide = np.zeros((len(raw), _BYTES), np.uint8)
    wide[:, _BYTES - width :] = raw
    if width == 1:  # a byte counts from 0 up, every wider sample from the middle
        wide[:, -1] ^= 0x80
    return rate, wide.view("<i4").reshape(-1, channels)
