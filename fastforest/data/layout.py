"""The 68 landmarks of 300-W (iBUG order): mirror permutation, regions, lines to draw.

"Right" and "left" are the person's own; the right eye (36..41) lies at smaller x in an image of an upright face.
"""

from __future__ import annotations

__all__ = ["FLIP_68", "LINES_68", "REGIONS_68"]

REGIONS_68: dict[str, range] = {
    "jaw": range(0, 17),
    "brows": range(17, 27),
    "nose": range(27, 36),
    "eyes": range(36, 48),
    "mouth": range(48, 68),
}
"""Landmark indices of each part; together they are 0..67."""


def _pairs(first: range, second: range) -> list[tuple[int, int]]:
    return list(zip(first, second, strict=True))


_MIRRORED = (
    _pairs(range(0, 8), range(16, 8, -1))
    + _pairs(range(17, 22), range(26, 21, -1))
    + _pairs(range(31, 33), range(35, 33, -1))
    + _pairs(range(36, 40), range(45, 41, -1))
    + _pairs(range(40, 42), range(47, 45, -1))
    + _pairs(range(48, 51), range(54, 51, -1))
    + _pairs(range(58, 60), range(56, 54, -1))
    + _pairs(range(60, 62), range(64, 62, -1))
    + _pairs(range(67, 68), range(65, 64, -1))
)


def _flip_permutation() -> tuple[int, ...]:
    partner = {index: index for index in range(68)}
    for right, left in _MIRRORED:
        partner[right], partner[left] = left, right
    return tuple(partner[index] for index in range(68))


FLIP_68: tuple[int, ...] = _flip_permutation()
"""Landmark i of a mirrored face is landmark FLIP_68[i] of the original; an involution."""

LINES_68: tuple[tuple[int, ...], ...] = (
    tuple(range(0, 17)),
    tuple(range(17, 22)),
    tuple(range(22, 27)),
    tuple(range(27, 31)),
    tuple(range(31, 36)),
    (*range(36, 42), 36),
    (*range(42, 48), 42),
    (*range(48, 60), 48),
    (*range(60, 68), 60),
)
"""Polylines that draw the face; a closed line ends where it began."""
