"""Landmark orders that data sets share: mirror permutation, regions, outer eye corners, lines to draw.

68: 300-W (iBUG). 98: WFLW. 29: COFW (and LFPW before it). 19: AFLW without the ears. "Right" and "left" are the person's
own; the right eye (36..41 of the 68) lies at smaller x in an image of an upright face.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import NamedTuple

__all__ = ["FLIP_68", "LINES_68", "REGIONS_68", "Layout", "layout_of"]


class Layout(NamedTuple):
    """What is known of an order of P landmarks.

    flip: landmark i of a mirrored face is landmark flip[i] of the original; an involution. regions: landmark indices of
    each part, together 0..P-1, each once; flip maps a region onto itself. outer_eyes: the outer corners of the right and
    the left eye, whose distance is the inter-ocular normaliser.
    """

    flip: tuple[int, ...]
    regions: Mapping[str, Sequence[int]]
    outer_eyes: tuple[int, int]


def layout_of(landmarks: int) -> Layout | None:
    """The order of faces with that many landmarks, None where none is known.

    >>> layout_of(98).outer_eyes, layout_of(5)
    ((60, 72), None)
    """
    return _LAYOUTS.get(landmarks)


def _pairs(first: Sequence[int], second: Sequence[int]) -> list[tuple[int, int]]:
    return list(zip(first, second, strict=True))


def _permutation(landmarks: int, *pairs: Iterable[tuple[int, int]]) -> tuple[int, ...]:
    """Exchanges the two of each pair; the others are their own partners."""
    partner = list(range(landmarks))
    for right, left in chain(*pairs):
        partner[right], partner[left] = left, right
    return tuple(partner)


REGIONS_68: dict[str, range] = {
    "jaw": range(0, 17),
    "brows": range(17, 27),
    "nose": range(27, 36),
    "eyes": range(36, 48),
    "mouth": range(48, 68),
}
"""Landmark indices of each part; together they are 0..67."""

FLIP_68: tuple[int, ...] = _permutation(
    68,
    _pairs(range(0, 8), range(16, 8, -1)),
    _pairs(range(17, 22), range(26, 21, -1)),
    _pairs(range(31, 33), range(35, 33, -1)),
    _pairs(range(36, 40), range(45, 41, -1)),
    _pairs(range(40, 42), range(47, 45, -1)),
    _pairs(range(48, 51), range(54, 51, -1)),
    _pairs(range(58, 60), range(56, 54, -1)),
    _pairs(range(60, 62), range(64, 62, -1)),
    _pairs(range(67, 68), range(65, 64, -1)),
)
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

_FLIP_98 = _permutation(
    98,
    _pairs(range(0, 16), range(32, 16, -1)),
    _pairs(range(33, 38), range(46, 41, -1)),
    _pairs(range(38, 42), range(50, 46, -1)),
    _pairs(range(55, 57), range(59, 57, -1)),
    _pairs(range(60, 65), range(72, 67, -1)),
    _pairs(range(65, 68), range(75, 72, -1)),
    _pairs(range(76, 79), range(82, 79, -1)),
    _pairs(range(83, 85), range(87, 85, -1)),
    _pairs(range(88, 90), range(92, 90, -1)),
    [(93, 95), (96, 97)],
)
_REGIONS_98 = {
    "jaw": range(0, 33),
    "brows": range(33, 51),
    "nose": range(51, 60),
    "eyes": (*range(60, 76), 96, 97),
    "mouth": range(76, 96),
}

_FLIP_29 = _permutation(
    29, [(0, 1), (2, 3), (4, 6), (5, 7), (8, 9), (10, 11), (12, 14), (13, 15), (16, 17), (18, 19), (22, 23)]
)
_REGIONS_29 = {
    "jaw": range(28, 29),
    "brows": range(0, 8),
    "nose": range(18, 22),
    "eyes": range(8, 18),
    "mouth": range(22, 28),
}

_FLIP_19 = _permutation(
    19, _pairs(range(0, 3), range(5, 2, -1)), _pairs(range(6, 9), range(11, 8, -1)), [(12, 14), (15, 17)]
)
_REGIONS_19 = {
    "jaw": range(18, 19),
    "brows": range(0, 6),
    "nose": range(12, 15),
    "eyes": range(6, 12),
    "mouth": range(15, 18),
}

_LAYOUTS = {
    68: Layout(FLIP_68, REGIONS_68, (36, 45)),
    98: Layout(_FLIP_98, _REGIONS_98, (60, 72)),
    29: Layout(_FLIP_29, _REGIONS_29, (8, 9)),
    19: Layout(_FLIP_19, _REGIONS_19, (6, 11)),
}
