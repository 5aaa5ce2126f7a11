"""Characters that can be read up close and vanish when the picture is shrunk.

A character is drawn on a small grey plate [PLATE_HEIGHT, PLATE_WIDTH].  Dark strokes alone would
leave a different grey smudge in a shrunken picture for each character, and a network can learn
smudges.  So the strokes get a light halo, computed such that shrinking averages strokes and halo
to nothing: of all patterns within the grey range, the one closest to the strokes that leaves
(almost) no trace.  A random mottle, coarse enough to survive shrinking, covers the rest.
"""

from __future__ import annotations

import functools

import numpy as np

# 5 x 7 dot-matrix characters, one hexadecimal row of five dots after another.  A-D are missing:
# they name the options.
_FONT = {
    "E": "1F 10 10 1E 10 10 1F",
    "F": "1F 10 10 1E 10 10 10",
    "H": "11 11 11 1F 11 11 11",
    "K": "11 12 14 18 14 12 11",
    "L": "10 10 10 10 10 10 1F",
    "P": "1E 11 11 1E 10 10 10",
    "R": "1E 11 11 1E 14 12 11",
    "T": "1F 04 04 04 04 04 04",
    "U": "11 11 11 11 11 11 0E",
    "X": "11 11 0A 04 0A 11 11",
    "Z": "1F 01 02 04 08 10 1F",
    "2": "0E 11 01 02 04 08 1F",
    "3": "1F 02 04 02 01 11 0E",
    "4": "02 06 0A 12 1F 02 02",
    "5": "1F 10 1E 01 01 11 0E",
    "6": "06 08 10 1E 11 11 0E",
    "7": "1F 01 02 04 08 08 08",
    "9": "0E 11 11 0F 01 02 0C",
}
CHARACTERS = "".join(_FONT)
"""Characters that can be drawn."""

_DOT = 2  # pixels per dot
GLYPH_WIDTH, GLYPH_HEIGHT = 5 * _DOT, 7 * _DOT
PLATE_WIDTH, PLATE_HEIGHT = 16, 20  # room for the halo and for a jitter of one pixel
INSET = ((PLATE_WIDTH - GLYPH_WIDTH) // 2, (PLATE_HEIGHT - GLYPH_HEIGHT) // 2)
"""Position (x, y) of an unjittered character on its plate, pixels."""

# Grey levels.  127 +- (95 + 32) stays within 0-254: saturation would break the cancellation.
PLATE_LEVEL = 127
_PATTERN_LIMIT = 95
_MOTTLE_LIMIT = 32
_MOTTLE_SPREAD = 16

_STROKE = 300.0  # beyond the limit: strokes are pushed to full contrast


def glyph_ink(glyph: str) -> np.ndarray:
    """The strokes of a character: bool [GLYPH_HEIGHT, GLYPH_WIDTH]."""
    rows = [int(row, 16) for row in _FONT[glyph].split()]
    dots = np.array([[row >> (4 - column) & 1 for column in range(5)] for row in rows], bool)
    return dots.repeat(_DOT, 0).repeat(_DOT, 1)


@functools.cache
def glyph_patterns(glyph: str, scale: float, concealment: float) -> np.ndarray:
    """What a character adds to its plate: int16 [3, 3, PLATE_HEIGHT, PLATE_WIDTH] grey levels.

    Entry [1 + dy, 1 + dx] shows the character (dx, dy) pixels off the plate's centre.  With s the
    strokes and Q the mean energy that a pattern leaves in a picture shrunk by `scale`, it is

        argmin_p |p + 300 s|^2 + concealment p'Qp   subject to -95 <= p <= 95

    Args:
      glyph: one of `CHARACTERS`.
      scale: factor of the shrinking that must hide the character, > 1.
      concealment: weight of the trace left by shrinking.  0 gives plain dark strokes.  At 1000 a
        trace of 0.2 grey levels (root mean square) is left under a mottle of 12; an ideal
        observer, who knows the exact positions of all pixels and the statistics of the mottle,
        would be right about 72 % of the time among four options, at 30000 about 39 %
        (estimates).  Trained readers stay at chance at both; see `visual_search_probe`.
    """
    strokes = np.zeros((3, 3, PLATE_HEIGHT, PLATE_WIDTH))
    for dy, dx in np.ndindex(3, 3):
        x, y = INSET[0] + dx - 1, INSET[1] + dy - 1
        strokes[dy, dx, y : y + GLYPH_HEIGHT, x : x + GLYPH_WIDTH] = glyph_ink(glyph)
    target = -_STROKE * strokes

    # ADMM: alternate the unconstrained minimum with clipping; `dual` carries their disagreement.
    # Q is a product of one factor along each axis, so the minimum is a division in the factors'
    # eigenvectors.
    weight = 0.3
    energy_y, basis_y = np.linalg.eigh(_shrunk_energy(PLATE_HEIGHT, scale))
    energy_x, basis_x = np.linalg.eigh(_shrunk_energy(PLATE_WIDTH, scale))
    divisor = 1 + weight + concealment * np.outer(energy_y, energy_x)
    clipped, dual = np.zeros_like(target), np.zeros_like(target)
    for _ in range(400):
        pulled = target + weight * (clipped - dual)
        free = basis_y @ (basis_y.T @ pulled @ basis_x / divisor) @ basis_x.T
        clipped = np.clip(free + dual, -_PATTERN_LIMIT, _PATTERN_LIMIT)
        dual += free - clipped
    patterns = np.round(clipped).astype(np.int16)
    patterns.setflags(write=False)  # the cache hands the same array to everybody
    return patterns


@functools.cache
def mottle_field() -> np.ndarray:
    """Smooth noise to cut a plate's mottle from: int16 [1024, 1024], +-32 grey levels, mean 0.

    Its grain, about six pixels, is what survives shrinking best and disturbs reading least.  The
    field is large, so that a network cannot learn it by heart.
    """
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence(1)))
    field = box_sums(box_sums(rng.integers(-128, 128, (1024, 1024), endpoint=True), 5), 5)
    field = field * _MOTTLE_SPREAD // round(float(field.std()))
    field = np.clip(field, -_MOTTLE_LIMIT, _MOTTLE_LIMIT).astype(np.int16)
    field.setflags(write=False)
    return field


def box_sums(values: np.ndarray, width: int) -> np.ndarray:
    """Sums over `width` x `width` windows that wrap around: integers, same shape."""
    for axis in (0, 1):
        wrapped = np.take(values, range(-width, values.shape[axis]), axis, mode="wrap")
        sums = np.moveaxis(wrapped.cumsum(axis), axis, 0)
        values = np.moveaxis(sums[width:] - sums[:-width], 0, axis)
    return values


def _shrunk_energy(size: int, scale: float) -> np.ndarray:
    """Energy that a row of `size` pixels leaves after shrinking, as a quadratic form [size, size].

    Mean over all positions of the row relative to the coarse pixels; largest eigenvalue 1.  The
    filter is the usual cubic (a = -0.5) stretched by `scale`, as in Pillow.
    """

    def cubic(x: np.ndarray) -> np.ndarray:
        x = np.abs(x)
        near = 1.5 * x**3 - 2.5 * x**2 + 1
        far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
        return np.where(x < 1, near, np.where(x < 2, far, 0.0))

    # A coarse pixel at every twelfth of a coarse step, from left of the row to right of it.
    centres = np.arange(-2 * scale, size + 2 * scale, scale / 12)
    response = cubic((np.arange(size) + 0.5 - centres[:, None]) / scale)
    energy = response.T @ response
    return energy / np.linalg.eigvalsh(energy)[-1]
