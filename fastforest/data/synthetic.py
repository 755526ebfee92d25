"""Drawn faces with 68 exact landmarks, for tests, demonstrations and pictures that may be published.

A face is a shallow three-dimensional model of 68 landmarks and a few helper points: numbers chosen by hand, from no
data set. Identity, expression and pose move the points; filled curves through the projected points are the picture, so
landmarks lie on the drawn outlines by construction.

Units: the model's x points to the image's right, y down, z to the viewer; 1 is about the width of a face from cheek to
nose, the outer eye corners are 0.92 apart. Images are float32 [H, W, 3] in [0, 1] while being drawn.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from .layout import FLIP_68

__all__ = ["draw_face", "mean_shape_68"]

Array = np.ndarray
Rng = np.random.Generator

_NEXT = np.arange(1, 1025)

MARGIN = 1.5
"""Side of the image over the longer side of the landmarks' box, as for crops of photographs."""

SUBROWS = 4
"""Scan lines in a row of pixels; along a row, coverage is exact."""

# The right half (x <= 0) and the midline of the face; the left half is its mirror image.
_RIGHT_HALF: dict[int, tuple[float, float, float]] = {
    0: (-0.745, -0.20, -0.30),
    1: (-0.740, 0.00, -0.29),
    2: (-0.715, 0.20, -0.27),
    3: (-0.670, 0.39, -0.24),
    4: (-0.590, 0.57, -0.19),
    5: (-0.470, 0.73, -0.10),
    6: (-0.325, 0.86, -0.01),
    7: (-0.165, 0.945, 0.06),
    8: (0.0, 0.975, 0.09),
    17: (-0.625, -0.365, -0.06),
    18: (-0.530, -0.445, 0.03),
    19: (-0.405, -0.475, 0.10),
    20: (-0.270, -0.455, 0.15),
    21: (-0.145, -0.410, 0.17),
    27: (0.0, -0.215, 0.17),
    28: (0.0, -0.085, 0.25),
    29: (0.0, 0.045, 0.33),
    30: (0.0, 0.175, 0.40),
    31: (-0.150, 0.265, 0.19),
    32: (-0.078, 0.295, 0.24),
    33: (0.0, 0.315, 0.27),
    36: (-0.460, -0.195, -0.01),
    37: (-0.385, -0.248, 0.05),
    38: (-0.280, -0.250, 0.07),
    39: (-0.190, -0.185, 0.05),
    40: (-0.275, -0.162, 0.06),
    41: (-0.380, -0.160, 0.04),
    48: (-0.285, 0.545, 0.08),
    49: (-0.180, 0.497, 0.18),
    50: (-0.070, 0.472, 0.23),
    51: (0.0, 0.488, 0.24),
    57: (0.0, 0.668, 0.21),
    58: (-0.080, 0.660, 0.20),
    59: (-0.180, 0.622, 0.16),
    60: (-0.245, 0.547, 0.09),
    61: (-0.080, 0.538, 0.20),
    62: (0.0, 0.545, 0.21),
    66: (0.0, 0.562, 0.21),
    67: (-0.080, 0.558, 0.20),
}

# From the left temple over the skull to the right temple, and the lower edge of the hair from right to left.
_SKULL = ((0.740, -0.46, -0.24), (0.670, -0.78, -0.20), (0.400, -1.05, -0.16), (0.0, -1.14, -0.14))
_HAIRLINE = ((-0.735, -0.30, -0.22), (-0.640, -0.58, -0.06), (-0.360, -0.76, 0.06), (0.0, -0.80, 0.09))


_COLLAR = np.array([(-2.2, 0.85), (-0.75, 0.42), (0.0, 0.62), (0.75, 0.42), (2.2, 0.85), (2.2, 3.0), (-2.2, 3.0)])


def mean_shape_68() -> Array:
    """The model's neutral frontal face: float32 [68, 2], symmetric in x, centred at its bounding box's centre, whose
    longer side is 1. `mean_shape_68() * (size / 1.5) + (size - 1) / 2` fits an image of side `size`."""
    points = _model_68()[:, :2]
    low, high = points.min(axis=0), points.max(axis=0)
    return ((points - (low + high) / 2) / (high - low).max()).astype(np.float32)


def draw_face(seed: int, index: int, size: int = 128) -> tuple[Array, Array]:
    """Face number `index` of the series `seed`: a function of its arguments alone.

    The landmarks' bounding box is centred, its longer side size / 1.5, as in crops of photographs; landmarks may be
    hidden behind glasses or an object. The drawing is described at any size, but its noise is drawn per pixel.

    Args:
        seed, index: non-negative.
        size: side, pixels.

    Returns:
        image uint8 [size, size, 3] and landmarks float32 [68, 2], 0-based pixels.
    """
    rng = np.random.default_rng((seed, index))
    points = _Points.draw(rng, size)
    look = _Look.draw(rng)
    canvas = _background(rng, size)
    head = np.zeros((size, size), np.float32)
    _paint_body(canvas, points, look)
    _paint_head(canvas, head, points, look, rng)
    _paint_nose(canvas, points, look)
    _paint_mouth(canvas, points, look)
    for eye, side in ((range(36, 42), 0), (range(42, 48), 1)):
        _paint_eye(canvas, points, look, eye, side)
    for brow in (range(17, 22), range(26, 21, -1)):
        _paint_stroke(canvas, points.landmarks[list(brow)], look.brow_width * points.unit, look.brow, 0.9, taper=True)
    _light(canvas, head, points, rng)
    _paint_fringe(canvas, points, look)
    if look.glasses:
        _paint_glasses(canvas, points, look)
    if rng.random() < 0.15:
        _paint_obstacle(canvas, points, look, rng)
    return _photograph(canvas, rng), points.landmarks.astype(np.float32)


class _Points(NamedTuple):
    """Everything in pixels. unit: the model's unit. gaze: iris centres [2, 2]. opening: of the mouth, 0 to 1."""

    landmarks: Array
    skull: Array
    hairline: Array
    ears: Array
    gaze: Array
    unit: float
    roll: float
    opening: float
    smile: float

    @staticmethod
    def draw(rng: Rng, size: int) -> _Points:
        face = _model_68()
        skull, hairline = _mirrored_arc(_SKULL), _mirrored_arc(_HAIRLINE)
        opening = float(rng.beta(0.7, 2.2)) if rng.random() < 0.5 else 0.0
        smile = float(rng.normal(0.25, 0.45))
        _identity(face, rng)
        _expression(face, rng, opening, smile)
        eyes = np.stack([face[36:42].mean(axis=0), face[42:48].mean(axis=0)])
        eyes[:, :2] += rng.normal(0, (0.022, 0.008), 2)
        ears = face[[1, 15]] + [[-0.04, 0.02, -0.10], [0.04, 0.02, -0.10]]
        skull *= [1.0, rng.normal(1, 0.04), 1.0]
        hairline[:, 1] += rng.normal(0, 0.05)
        yaw, pitch, roll = np.clip(rng.normal(0, (19, 8, 9)), (-40, -18, -28), (40, 18, 28)) * (np.pi / 180)
        for contour in (face[0:17], skull, hairline):
            _slide_contour(contour, float(yaw))
        parts = (face, skull, hairline, ears, eyes)
        flat = _project(np.concatenate(parts), yaw, pitch, roll)
        low, high = flat[:68].min(axis=0), flat[:68].max(axis=0)
        unit = size / MARGIN / float((high - low).max())
        pixels = (flat - (low + high) / 2) * unit + (size - 1) / 2
        cuts = np.cumsum([len(part) for part in parts])[:-1]
        landmarks, skull, hairline, ears, gaze = np.split(pixels, cuts)
        return _Points(landmarks, skull, hairline, ears, gaze, unit, float(roll), opening, smile)


class _Look(NamedTuple):
    """Colours [3] in [0, 1], widths in model units, and what the face wears."""

    skin: Array
    hair: Array
    brow: Array
    lips: Array
    iris: Array
    clothes: Array
    brow_width: float
    hair_size: float
    parting: float
    long_hair: bool
    bald: bool
    beard: float
    glasses: str
    frame: Array

    @staticmethod
    def draw(rng: Rng) -> _Look:
        tone = rng.random()
        skin = _ramp(tone, ((0.97, 0.80, 0.70), (0.88, 0.67, 0.53), (0.68, 0.47, 0.34), (0.36, 0.23, 0.17)))
        skin = skin * rng.normal(1, 0.03, 3)
        hairs = ((0.07, 0.06, 0.06), (0.16, 0.10, 0.07), (0.33, 0.20, 0.11), (0.66, 0.49, 0.28), (0.62, 0.61, 0.60))
        hair = np.array(hairs[rng.choice(5, p=(0.34, 0.28, 0.18, 0.12, 0.08))]) * rng.uniform(0.75, 1.2)
        irises = ((0.22, 0.13, 0.07), (0.36, 0.24, 0.12), (0.30, 0.42, 0.50), (0.30, 0.38, 0.24))
        iris = np.array(irises[rng.choice(4, p=(0.35, 0.25, 0.25, 0.15) if tone < 0.4 else (0.8, 0.2, 0, 0))])
        lips = skin * (0.86, 0.60, 0.60) + np.array((0.10, 0.0, 0.02)) * rng.random()
        bearded = rng.random() < 0.22
        worn = rng.random()
        return _Look(
            skin=np.clip(skin, 0, 1),
            hair=np.clip(hair, 0, 1),
            brow=np.clip(0.55 * hair + 0.08 * skin, 0, 1),
            lips=np.clip(lips, 0, 1),
            iris=iris,
            clothes=_muted(rng),
            brow_width=float(rng.uniform(0.045, 0.095)),
            hair_size=float(rng.uniform(1.04, 1.20)),
            parting=float(rng.uniform(-0.6, 0.6)),
            long_hair=bool(not bearded and rng.random() < 0.45),
            bald=bool(rng.random() < 0.08),
            beard=float(rng.uniform(0.2, 0.85)) if bearded else 0.0,
            glasses="dark" if worn < 0.04 else "clear" if worn < 0.2 else "",
            frame=rng.random(3) * 0.35,
        )


@lru_cache(maxsize=1)
def _neutral() -> Array:
    points = np.zeros((68, 3))
    for index, (x, y, z) in _RIGHT_HALF.items():
        points[FLIP_68[index]] = -x, y, z
        points[index] = x, y, z
    points.setflags(write=False)
    return points


def _model_68() -> Array:
    return _neutral().copy()


def _mirrored_arc(half: tuple[tuple[float, float, float], ...]) -> Array:
    """The half arc, whose last point is on the midline, and its mirror image."""
    right = np.array(half)
    return np.concatenate([right, (right * [-1, 1, 1])[-2::-1]])


def _identity(face: Array, rng: Rng) -> None:
    """Proportions of a person, in place: each is a smooth change of one part."""
    spread = rng.normal(0, 1, 14)
    jaw, brows, nose, eyes, mouth = slice(0, 17), slice(17, 27), slice(27, 36), slice(36, 48), slice(48, 68)
    below = np.clip((face[jaw, 1] + 0.2) / 1.2, 0, 1)
    face[jaw, 0] *= 1 + 0.05 * spread[0] + 0.07 * spread[1] * np.sin(np.pi * below)
    face[jaw, 1] += 0.06 * spread[2] * below
    face[jaw, 0] += 0.015 * spread[13] * below
    face[brows, 1] += 0.03 * spread[3]
    face[brows, 1] += 0.018 * spread[4] * (np.abs(face[brows, 0]) - 0.38) / 0.25
    top = face[27, 1]
    face[nose, 1] = top + (face[nose, 1] - top) * (1 + 0.08 * spread[5])
    face[nose, 0] *= 1 + 0.14 * spread[6]
    face[nose, 2] *= 1 + 0.10 * spread[7]
    for eye in (slice(36, 42), slice(42, 48)):
        center = face[eye].mean(axis=0)
        face[eye, :2] = center[:2] + (face[eye, :2] - center[:2]) * (1 + 0.06 * spread[8], 1 + 0.13 * spread[9])
    face[eyes, 0] += 0.02 * spread[10] * np.sign(face[eyes, 0])
    middle = face[48:68, 1].mean()
    face[mouth, 0] *= 1 + 0.09 * spread[11]
    face[mouth, 1] = middle + (face[mouth, 1] - middle) * (1 + 0.14 * spread[12]) + 0.03 * spread[5]
    face[:, :2] += rng.normal(0, 0.004, (68, 2))


def _expression(face: Array, rng: Rng, opening: float, smile: float) -> None:
    """Mouth, jaw, brows and lids, in place."""
    smile = min(max(smile, -0.5), 1.0)
    lower = {55: 0.6, 56: 0.95, 57: 1.0, 58: 0.95, 59: 0.6, 65: 0.95, 66: 1.0, 67: 0.95}
    for index, weight in lower.items():
        face[index, 1] += 0.30 * opening * weight
    for index in (48, 54, 60, 64):
        face[index, 1] += 0.10 * opening
    face[48:68, 0] *= 1 - 0.14 * opening
    chin = np.clip((face[0:17, 1] - 0.3) / 0.65, 0, 1)
    face[0:17, 1] += 0.27 * opening * chin
    corner = np.clip(np.abs(face[48:68, 0]) / 0.285, 0, 1) ** 2
    face[48:68, 0] *= 1 + 0.20 * max(smile, 0)
    face[48:68, 1] += (0.02 - 0.085 * corner) * smile
    face[48:68, 2] -= 0.05 * corner * max(smile, 0)
    face[17:27, 1] -= 0.05 * rng.normal(0.1, 0.8)
    closed = float(rng.uniform(0.6, 1.0)) if rng.random() < 0.08 else float(np.clip(rng.normal(0.08, 0.12), -0.2, 0.5))
    for upper, lid in ((37, 41), (38, 40), (43, 47), (44, 46)):
        face[upper, 1] += 0.85 * closed * (face[lid, 1] - face[upper, 1])


def _slide_contour(points: Array, yaw: float) -> None:
    """Moves the far side of a turned head's outline towards the viewer, in place: the visible outline is then the
    cheek, not the ear, and people mark it there."""
    far = np.clip(points[:, 0] * np.sign(yaw) / 0.4, 0, 1)
    points[:, 2] += 0.34 * abs(np.sin(yaw)) * far


def _project(points: Array, yaw: float, pitch: float, roll: float) -> Array:
    """Rotation about a point inside the head, then a weak perspective. [.., 3] -> [.., 2]."""
    cy, sy, cp, sp, cr, sr = np.cos(yaw), np.sin(yaw), np.cos(pitch), np.sin(pitch), np.cos(roll), np.sin(roll)
    about_y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    about_x = np.array([[1, 0, 0], [0, cp, -sp], [0, sp, cp]])
    about_z = np.array([[cr, -sr, 0], [sr, cr, 0], [0, 0, 1]])
    turned = (points + np.array((0, 0, 0.3))) @ (about_z @ about_x @ about_y).T
    return turned[:, :2] / (1 - 0.10 * turned[:, 2:])


def _background(rng: Rng, size: int) -> Array:
    """Two octaves of smooth colour noise and a few flat shapes: [size, size, 3]."""
    canvas = np.full((size, size, 3), _muted(rng), np.float32)
    for cells, strength in ((4, 0.16), (20, 0.05)):
        basis = _bilinear(cells, size)
        noise = rng.normal(0, strength, (cells, cells, 1)) + rng.normal(0, strength / 4, (cells, cells, 3))
        wide = np.matmul(basis, noise.astype(np.float32))
        canvas += (basis @ wide.reshape(cells, -1)).reshape(canvas.shape)
    for _ in range(rng.integers(0, 4)):
        center, extent = rng.random(2) * size, rng.uniform(0.05, 0.5, 2) * size
        corners = center + extent * [(-1, -1), (1, -1), (1, 1), (-1, 1)] + rng.normal(0, 0.05 * size, (4, 2))
        _fill(canvas, corners, _muted(rng), 0.8)
    return canvas


def _muted(rng: Rng) -> Array:
    """A colour that is mostly grey."""
    return np.clip(rng.uniform(0.1, 0.9) + rng.normal(0, 0.10, 3), 0, 1)


def _paint_body(canvas: Array, points: _Points, look: _Look) -> None:
    """Hair behind the head, neck, shoulders."""
    unit, chin, mid = points.unit, points.landmarks[8], points.landmarks[[0, 16]].mean(axis=0)
    if not look.bald:
        crown = mid + (points.skull - mid) * look.hair_size
        outline = _curve(np.concatenate([crown, points.landmarks[[0, 16]] * 0.9 + mid * 0.1]))
        if look.long_hair:
            _fill(canvas, _curve(_locks(points, look)), look.hair * 0.7)
        _fill(canvas, outline, look.hair * 0.8)
    right, left = points.landmarks[4], points.landmarks[12]
    low = np.array((0.03, 1.1)) * unit
    neck = np.stack([right, left, left + low, right + low * (-1, 1)])
    neck[:, 0] = (neck[:, 0] - neck[:, 0].mean()) * 0.85 + neck[:, 0].mean()
    _fill(canvas, neck, look.skin * 0.66)
    _glow(canvas, chin, 0.75 * unit, look.skin * 0.36, 0.75)
    collar = chin + _COLLAR * unit
    _fill(canvas, collar, look.clothes)


def _locks(points: _Points, look: _Look) -> Array:
    """Outline of long hair: from the temples down beside the jaw."""
    right, left = points.landmarks[0], points.landmarks[16]
    across, down = (left - right) / 2, np.array((-(left - right)[1], (left - right)[0])) / 2
    side = np.array([(-1.0, -0.5), (-1.12, 0.3), (-1.2, 1.2), (-1.1, 2.2)])
    plan = np.concatenate([side, side[::-1] * (-1, 1)])
    return (right + left) / 2 + look.hair_size * (plan[:, :1] * across + plan[:, 1:] * down)


def _paint_head(canvas: Array, head: Array, points: _Points, look: _Look, rng: Rng) -> None:
    """Ears, skin, beard, blush; `head` receives the coverage of the skin."""
    unit, marks = points.unit, points.landmarks
    for ear in points.ears:
        _fill(canvas, _ellipse(ear, 0.11 * unit, 0.21 * unit, points.roll), look.skin * 0.88)
        _fill(canvas, _ellipse(ear, 0.05 * unit, 0.12 * unit, points.roll), look.skin * 0.68)
    outline = np.concatenate([_curve(marks[0:17], closed=False), _curve(points.skull, closed=False)])
    _fill(canvas, outline, look.skin, into=head)
    for cheek in ((marks[2] + marks[31]) / 2, (marks[14] + marks[35]) / 2):
        _glow(canvas, cheek, 0.22 * unit, look.skin * (1.0, 0.80, 0.80), 0.35)
    _glow(
        canvas,
        (marks[21] + marks[22]) / 2 - np.array((0, 0.35)) * unit,
        0.35 * unit,
        np.minimum(look.skin * 1.12, 1),
        0.45,
    )
    _glow(canvas, marks[8] * 0.72 + marks[57] * 0.28, 0.10 * unit, np.minimum(look.skin * 1.10, 1), 0.4)
    if look.beard:
        for reach in (0.10, 0.05, 0.0):
            edge = marks[[15, 14, 13, 54, 35, 33, 31, 48, 3, 2, 1]]
            inward = marks[[45, 45, 54, 35, 33, 30, 33, 31, 48, 36, 36]] - edge
            upper = (
                edge + inward * np.array((0.05, 0.14, 0.22, 0.0, -0.35, -0.4, -0.35, 0.0, 0.22, 0.14, 0.05))[:, None]
            )
            upper += reach * inward * np.array((1, 1, 1, 0, -1, -1, -1, 0, 1, 1, 1))[:, None]
            shape = np.concatenate([_curve(marks[1:16], closed=False), _curve(upper, closed=False)])
            _fill(canvas, shape, look.hair, look.beard * 0.45)
    for start, stop in ((31, 48), (35, 54)):
        fold = np.stack(
            [marks[start] + (marks[start] - marks[33]) * 0.35, (marks[start] + marks[stop]) / 2, marks[stop]]
        )
        fold[1:] += (fold[0] - marks[33]) * 0.30
        _paint_stroke(canvas, fold, 0.035 * unit, look.skin * 0.72, float(rng.uniform(0.15, 0.6)), taper=True)


def _paint_nose(canvas: Array, points: _Points, look: _Look) -> None:
    unit, marks = points.unit, points.landmarks
    dark, light = look.skin * 0.66, np.minimum(look.skin * 1.16, 1)
    for corner, inner, brow in ((31, 39, 21), (35, 42, 22)):
        side = np.stack([marks[brow], (marks[27] + marks[inner]) / 2, (marks[29] + marks[corner]) / 2, marks[corner]])
        _paint_stroke(canvas, side, 0.11 * unit, look.skin * 0.80, 0.45, taper=True)
        _glow(canvas, marks[corner] * 0.8 + marks[30] * 0.2, 0.07 * unit, look.skin * 0.9, 0.6)
    _paint_stroke(canvas, marks[27:31], 0.085 * unit, light, 0.55, taper=True)
    _glow(canvas, marks[30], 0.085 * unit, light, 0.85)
    _paint_stroke(canvas, marks[31:36], 0.045 * unit, dark, 0.85, taper=True)
    for nostril, outer in ((32, 31), (34, 35)):
        center = marks[nostril] * 0.6 + marks[outer] * 0.4 - (marks[33] - marks[30]) * 0.14
        _fill(canvas, _ellipse(center, 0.040 * unit, 0.022 * unit, points.roll), look.skin * 0.35, 0.9)
    _glow(canvas, marks[33] * 0.75 + marks[51] * 0.25, 0.09 * unit, look.skin * 0.72, 0.45)


def _paint_mouth(canvas: Array, points: _Points, look: _Look) -> None:
    unit, marks = points.unit, points.landmarks
    outer, inner = marks[48:60], marks[60:68]
    _glow(canvas, marks[57] * 0.72 + marks[8] * 0.28, 0.14 * unit, look.skin * 0.74, 0.5)
    _fill(canvas, _lips(outer, 6), look.lips)
    upper = np.concatenate([outer[:7], inner[4::-1]])
    _fill(canvas, upper, look.lips * 0.82, 0.8)
    _glow(canvas, (marks[57] + marks[66]) / 2, 0.08 * unit, np.minimum(look.lips * 1.25, 1), 0.6)
    gap = float(np.abs(marks[66] - marks[62]).sum()) / unit
    if gap > 0.035:
        _fill(canvas, _lips(inner, 4), np.array((0.20, 0.05, 0.05)))
        if points.smile > 0.15 or 0.1 < gap < 0.22:
            depth = min(0.9, 0.075 / gap)
            bottom = inner[[4, 3, 2, 1, 0]] + depth * (inner[[4, 5, 6, 7, 0]] - inner[[4, 3, 2, 1, 0]])
            _fill(canvas, np.concatenate([inner[:5], bottom[1:4]]), np.array((0.93, 0.91, 0.86)))
        if gap > 0.18:
            _glow(canvas, inner[6] * 0.8 + inner[2] * 0.2, 0.07 * unit, np.array((0.62, 0.25, 0.25)), 0.8)
    else:
        line = inner[:5] * 0.5 + inner[[0, 7, 6, 5, 4]] * 0.5
        _paint_stroke(canvas, line, 0.030 * unit, look.lips * 0.38, 0.9, taper=True)
    for corner in (48, 54):
        _glow(canvas, marks[corner], 0.03 * unit, look.skin * 0.5, 0.7)


def _lips(loop: Array, corner: int) -> Array:
    """A smooth loop with sharp corners at points 0 and `corner`."""
    there, back = loop[: corner + 1], np.concatenate([loop[corner:], loop[:1]])
    return np.concatenate([_curve(there, closed=False)[:-1], _curve(back, closed=False)[:-1]])


def _paint_eye(canvas: Array, points: _Points, look: _Look, eye: range, side: int) -> None:
    unit, marks, gaze = points.unit, points.landmarks[list(eye)], points.gaze[side]
    center = marks.mean(axis=0)
    _glow(canvas, center - np.array((0, 0.03)) * unit, 0.17 * unit, look.skin * 0.70, 0.55)
    _glow(canvas, center + np.array((0, 0.13)) * unit, 0.10 * unit, look.skin * 0.84, 0.4)
    outline = _lips(marks, 3)
    height, width = canvas.shape[:2]
    shape = _coverage(outline, height, width)
    if shape is not None:
        mask, y0, x0 = shape
        window = canvas[y0 : y0 + mask.shape[0], x0 : x0 + mask.shape[1]]
        inside = window.copy()
        local = gaze - (x0, y0)
        inside[:] = np.minimum(look.skin * 0.25 + 0.62, 0.9)
        _fill(inside, _ellipse(local, 0.066 * unit, 0.066 * unit, 0), look.iris * 0.6)
        _fill(inside, _ellipse(local, 0.055 * unit, 0.055 * unit, 0), look.iris * 1.15)
        _fill(inside, _ellipse(local, 0.028 * unit, 0.028 * unit, 0), np.array((0.03, 0.03, 0.03)))
        glint = local + np.array((0.022, -0.025)) * unit
        _fill(inside, _ellipse(glint, 0.014 * unit, 0.014 * unit, 0), np.array((1.0, 1.0, 1.0)))
        window += mask[..., None] * (inside - window)
    lash = np.minimum(look.brow * 0.6, look.skin * 0.4)
    _paint_stroke(canvas, marks[:4], 0.034 * unit, lash, 0.95, taper=True)
    _paint_stroke(canvas, marks[[3, 4, 5, 0]], 0.016 * unit, look.skin * 0.5, 0.8)
    crease = marks[:4] + (marks[:4] - marks[[0, 5, 4, 3]]) * 0.45 - np.array((0, 0.022)) * unit
    _paint_stroke(canvas, crease, 0.016 * unit, look.skin * 0.6, 0.6, taper=True)


def _light(canvas: Array, head: Array, points: _Points, rng: Rng) -> None:
    """Shades the skin as a rounded form lit from one side, in place."""
    size = len(canvas)
    marks = points.landmarks
    center = (marks[27] + marks[33]) / 4 + (marks[:17].min(axis=0) + marks[:17].max(axis=0)) / 4
    axis = np.arange(size, dtype=np.float32)
    u = (axis - center[0]) / (np.ptp(marks[:17, 0]) / 2 + 1e-3)
    v = (axis - center[1]) / (1.1 * points.unit)
    toward = rng.normal(0, (0.17, 0.10))
    rim = rng.uniform(0.10, 0.28)
    shade = 1 + (toward[1] * v - rim * v**4 * 0.4)[:, None] + (toward[0] * u - rim * u**4)[None, :]
    canvas *= (1 + head * (np.clip(shade, 0.45, 1.5) - 1)).astype(np.float32)[..., None]


def _paint_fringe(canvas: Array, points: _Points, look: _Look) -> None:
    """Hair in front: between the hair line and the outer edge of the hair."""
    if look.bald:
        return
    center = points.landmarks[[0, 16]].mean(axis=0)
    outer = center + (_curve(points.skull, closed=False) - center) * look.hair_size
    line = points.hairline.copy()
    unit, count = points.unit, len(line)
    part = look.parting * (points.landmarks[16] - center)
    lift = np.exp(-(((np.arange(count) / (count - 1) - 0.5) * 2 - look.parting) ** 2) / 0.08)
    line += (center + part - points.landmarks[8]) * (lift * 0.10)[:, None]
    inner = _curve(line, closed=False)
    _fill(canvas, np.concatenate([inner, outer]), look.hair)
    crown = outer[::-1]
    for number in range(9):
        at = 3 * number + 3
        swept = crown[min(max(at + (3 if at < 15 * (1 + look.parting) else -3), 0), len(crown) - 1)]
        lock = np.stack([inner[at], (inner[at] + crown[at]) / 2, swept])
        shade = (1.30, 0.75, 1.10, 0.62)[number % 4]
        _paint_stroke(canvas, lock, 0.09 * unit, np.minimum(look.hair * shade, 1), 0.4, taper=True)


def _paint_glasses(canvas: Array, points: _Points, look: _Look) -> None:
    unit, marks = points.unit, points.landmarks
    centers = [marks[36:42].mean(axis=0), marks[42:48].mean(axis=0)]
    for center, (outer, inner), temple in zip(centers, ((36, 39), (45, 42)), (0, 16), strict=True):
        across = np.linalg.norm(marks[outer] - marks[inner]) * 0.72
        lens = _ellipse(center + np.array((0, 0.02)) * unit, float(across) + 0.03 * unit, 0.165 * unit, points.roll)
        if look.glasses == "dark":
            _fill(canvas, lens, np.array((0.05, 0.05, 0.06)), 0.93)
        else:
            _fill(canvas, lens, np.array((0.9, 0.95, 1.0)), 0.10)
        _fill(canvas, _ribbon(np.concatenate([lens, lens[:2]]), 0.030 * unit), look.frame)
        reach = center + (marks[outer] - center) * 1.35
        _paint_stroke(canvas, np.stack([reach, marks[temple]]), 0.032 * unit, look.frame, 1.0)
    ends = [center + (marks[inner] - center) * 1.2 for center, inner in zip(centers, (39, 42), strict=True)]
    _paint_stroke(canvas, np.stack([ends[0], marks[27], ends[1]]), 0.032 * unit, look.frame, 1.0)


def _paint_obstacle(canvas: Array, points: _Points, look: _Look, rng: Rng) -> None:
    """A hand, a microphone or a sheet that hides some landmarks."""
    unit = points.unit
    kind = rng.integers(3)
    target = points.landmarks[rng.integers(68)]
    angle = rng.uniform(0, np.pi)
    if kind == 0:
        away = np.array((np.cos(angle), np.sin(angle)))
        across = np.array((-away[1], away[0]))
        palm = target + away * 0.45 * unit
        _fill(canvas, _ellipse(palm, 0.36 * unit, 0.28 * unit, angle), look.skin * 0.86)
        for finger in range(4):
            root = palm + across * (finger - 1.5) * 0.14 * unit
            tip = root - away * float(rng.uniform(0.5, 0.62)) * unit
            for width, shade in ((0.135, 0.66), (0.110, 0.93)):
                _paint_stroke(canvas, np.stack([root, tip]), width * unit, look.skin * shade, 1.0)
                _fill(canvas, _ellipse(tip, 0.5 * width * unit, 0.5 * width * unit, 0), look.skin * shade)
    elif kind == 1:
        handle = target + np.array((np.cos(angle), np.sin(angle) + 0.6)) * unit
        _paint_stroke(canvas, np.stack([target, handle]), 0.14 * unit, np.array((0.12, 0.12, 0.13)), 1.0)
        _fill(canvas, _ellipse(target, 0.17 * unit, 0.14 * unit, angle), np.array((0.25, 0.25, 0.27)))
    else:
        outward = target - points.landmarks[30]
        center = target + outward * 0.6
        _fill(canvas, _box(center, rng.uniform(0.2, 0.45, 2) * unit, angle), _muted(rng))


def _photograph(canvas: Array, rng: Rng) -> Array:
    """Focus, exposure, white balance and sensor noise: uint8."""
    size = len(canvas)
    blur = _gaussian(size, round(float(rng.uniform(0.3, 0.3 + size / 160)), 1))
    for _ in range(2):
        canvas = (blur @ canvas.reshape(size, -1)).reshape(canvas.shape).transpose(1, 0, 2)
    image = canvas
    gain = rng.normal(1, 0.04, 3) * rng.uniform(0.75, 1.15)
    image = (image - 0.5) * rng.uniform(0.8, 1.1) + 0.5
    if rng.random() < 0.06:
        image[:] = image @ np.array((0.3, 0.59, 0.11), np.float32)[:, None]
    image = image * (255 * gain).astype(np.float32)
    image += rng.standard_normal((size, size, 1), np.float32) * np.float32(rng.uniform(1, 7))
    return np.clip(image, 0, 255).astype(np.uint8)


def _fill(canvas: Array, polygon: Array, colour: Array, alpha: float = 1.0, into: Array | None = None) -> None:
    """Blends a colour over a polygon's antialiased inside, in place; `into` receives the coverage."""
    shape = _coverage(polygon, *canvas.shape[:2])
    if shape is None:
        return
    mask, y0, x0 = shape
    rows, columns = slice(y0, y0 + mask.shape[0]), slice(x0, x0 + mask.shape[1])
    if into is not None:
        into[rows, columns] = mask
    window = canvas[rows, columns]
    window += (mask * np.float32(alpha))[..., None] * (np.asarray(colour, np.float32) - window)


def _paint_stroke(
    canvas: Array, points: Array, width: float, colour: Array, alpha: float, *, taper: bool = False
) -> None:
    _fill(canvas, _ribbon(_curve(points, closed=False), width, taper), colour, alpha)


def _glow(canvas: Array, center: Array, radius: float, colour: Array, alpha: float) -> None:
    """Blends a colour with a Gaussian weight of standard deviation radius / 1.5 around a centre, in place."""
    height, width = canvas.shape[:2]
    x0, y0 = (max(int(c - 2 * radius), 0) for c in center)
    x1, y1 = min(int(center[0] + 2 * radius) + 2, width), min(int(center[1] + 2 * radius) + 2, height)
    if x0 >= x1 or y0 >= y1:
        return
    scale = 1.5 / radius
    across = np.exp(-0.5 * ((np.arange(x0, x1, dtype=np.float32) - center[0]) * scale) ** 2)
    down = np.exp(-0.5 * ((np.arange(y0, y1, dtype=np.float32) - center[1]) * scale) ** 2)
    mask = (np.float32(alpha) * down[:, None] * across).astype(np.float32)
    window = canvas[y0:y1, x0:x1]
    window += mask[..., None] * (np.asarray(colour, np.float32) - window)


def _coverage(polygon: Array, height: int, width: int) -> tuple[Array, int, int] | None:
    """Share of each pixel's area inside a polygon: (mask [h, w] float32, y0, x0), clipped to the canvas, or None.

    Pixel i covers [i - 0.5, i + 0.5). On each scan line every crossing edge adds its direction to all area to its
    right; a running sum along the row turns these steps into winding numbers, whose magnitude is cut at 1.
    """
    low, high = polygon.min(axis=0), polygon.max(axis=0)
    x0, y0 = max(int(np.floor(low[0] + 0.5)), 0), max(int(np.floor(low[1] + 0.5)), 0)
    x1, y1 = min(int(np.floor(high[0] + 0.5)) + 1, width), min(int(np.floor(high[1] + 0.5)) + 1, height)
    columns, rows = x1 - x0, y1 - y0
    if columns <= 0 or rows <= 0:
        return None
    start_x, start_y = polygon[:, 0], polygon[:, 1]
    end_x, end_y = polygon[_NEXT[: len(polygon)] % len(polygon)].T
    lines = (np.arange(rows * SUBROWS) + 0.5) / SUBROWS - 0.5 + y0
    above = lines[:, None] >= start_y
    crossing = above != (lines[:, None] >= end_y)
    line, edge = crossing.nonzero()
    if len(line) == 0:
        return None
    slope = (end_x[edge] - start_x[edge]) / (end_y[edge] - start_y[edge])
    x = start_x[edge] + (lines[line] - start_y[edge]) * slope
    position = np.clip(x + 0.5 - x0, 0, columns)
    cell = position.astype(np.int64)
    step = np.where(above[line, edge], 1.0, -1.0) / SUBROWS
    part = step * (position - cell)
    index = (line // SUBROWS) * (columns + 2) + cell
    steps = np.bincount(index, step - part, rows * (columns + 2))
    steps += np.bincount(index + 1, part, rows * (columns + 2))
    mask = steps.reshape(rows, columns + 2).cumsum(axis=1)[:, :columns]
    return np.minimum(np.abs(mask), 1).astype(np.float32), y0, x0


def _curve(points: Array, closed: bool = True, samples: int = 5) -> Array:
    """Catmull-Rom spline through points [n, 2]: polyline that contains them, `samples` pieces between neighbours."""
    return _catmull_rom(len(points), closed, samples) @ points


@lru_cache(maxsize=64)
def _catmull_rom(count: int, closed: bool, samples: int) -> Array:
    segments = count if closed else count - 1
    t = np.arange(samples) / samples
    weights = np.stack([-t + 2 * t**2 - t**3, 2 - 5 * t**2 + 3 * t**3, t + 4 * t**2 - 3 * t**3, t**3 - t**2]) / 2
    matrix = np.zeros((segments * samples + (not closed), count))
    for segment in range(segments):
        for k, weight in enumerate(weights):
            control = segment + k - 1
            control = control % count if closed else min(max(control, 0), count - 1)
            matrix[segment * samples : (segment + 1) * samples, control] += weight
    if not closed:
        matrix[-1, -1] = 1
    return matrix


def _ribbon(path: Array, width: float, taper: bool = False) -> Array:
    """Outline of a line of that width along a path; with taper it thins to a quarter at both ends."""
    padded = np.concatenate([path[:1], path, path[-1:]])
    normal = (padded[2:] - padded[:-2])[:, ::-1] * (-1, 1)
    normal /= np.maximum(np.sqrt((normal * normal).sum(axis=1, keepdims=True)), 1e-9)
    half = np.full(len(path), width / 2)
    if taper:
        half *= 0.25 + 0.75 * np.sin(np.linspace(0.05, np.pi - 0.05, len(path))) ** 0.7
    return np.concatenate([path + normal * half[:, None], (path - normal * half[:, None])[::-1]])


@lru_cache(maxsize=1)
def _circle() -> Array:
    turn = np.arange(24) * (2 * np.pi / 24)
    return np.stack([np.cos(turn), np.sin(turn)], axis=1)


def _ellipse(center: Array, a: float, b: float, angle: float) -> Array:
    return center + (_circle() * (a, b)) @ _turn(angle)


def _box(center: Array, half: Array, angle: float) -> Array:
    corners = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * half
    return center + corners @ _turn(angle)


def _turn(angle: float) -> Array:
    """Rotates row vectors."""
    cos, sin = np.cos(angle), np.sin(angle)
    return np.array([[cos, sin], [-sin, cos]])


def _ramp(t: float, stops: tuple[tuple[float, float, float], ...]) -> Array:
    colours = np.array(stops)
    at = np.linspace(0, 1, len(stops))
    return np.array([np.interp(t, at, colours[:, channel]) for channel in range(3)])


@lru_cache(maxsize=8)
def _bilinear(cells: int, size: int) -> Array:
    """[size, cells]: linear interpolation from cells to pixels."""
    position = (np.arange(size) + 0.5) / size * (cells - 1)
    return np.maximum(0, 1 - np.abs(position[:, None] - np.arange(cells))).astype(np.float32)


@lru_cache(maxsize=64)
def _gaussian(size: int, sigma: float) -> Array:
    """[size, size]: Gaussian smoothing along one axis, rows sum to 1."""
    distance = np.arange(size)[:, None] - np.arange(size)
    weights = np.exp(-0.5 * (distance / sigma) ** 2)
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
