"""Made-up voices: harmonics of a moving pitch under moving formants, in syllables with pauses between.

They are no one's, say nothing, and a number always makes the same one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

HARMONICS, FORMANTS = 24, 3
LOWEST, HIGHEST = (80.0, 250.0, 900.0, 2000.0), (260.0, 900.0, 2300.0, 3500.0)
"""Of pitch and formants, in Hz."""
WIDTH = 120.0
"""Of a formant, in Hz."""


def made_up_voice(number: int, seconds: int, rate: int) -> NDArray[np.float32]:
    """Return the voice of this number, ``seconds * rate`` samples from -1 to 1, float32."""
    import numpy as np

    draw = np.random.default_rng(number)
    time = np.linspace(0, seconds, seconds * rate, endpoint=False)
    corners = np.linspace(0, seconds, 4 * seconds + 1)
    tracks = [
        np.interp(time, corners, draw.uniform(low, high, len(corners)))
        for low, high in zip(LOWEST, HIGHEST, strict=True)
    ]
    phase = 2 * np.pi * np.cumsum(tracks[0]) / rate
    sound = np.zeros(len(time))
    for harmonic in range(1, HARMONICS + 1):
        near = sum(1 / (1 + ((harmonic * tracks[0] - formant) / WIDTH) ** 2) for formant in tracks[1:])
        sound += near * np.sin(harmonic * phase)
    sound *= np.clip(np.interp(time, corners, draw.uniform(-0.5, 1.0, len(corners))), 0, 1)
    sound += 0.02 * draw.uniform() * draw.standard_normal(len(time))
    return cast("NDArray[np.float32]", (0.3 * sound / max(1e-6, float(np.abs(sound).max()))).astype(np.float32))
