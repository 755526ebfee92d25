"""AFLW2000-3D: a MATLAB file an image with 68 points of a fitted 3-D face and its pose."""

from __future__ import annotations

import numpy as np

from ..errors import DataError
from ..matlab import load_mat
from ..pts import existing_folder
from ..records import Record, Records
from ..text import PathLike
from .common import image_beside, images_of, matrix, points_of

__all__ = ["read_aflw2000"]


def read_aflw2000(folder: PathLike) -> Records:
    """Faces of the .mat files of a folder, each beside its image, in order of name.

    pt3d_68 [3, 68] holds x and y in the image, counted from 1 (the fit mirrors rows as height + 1 - y): 1 is subtracted;
    its depth is left aside. The points are a 3-D face's, so its jaw does not follow the outline of a turned one.
    attributes: pitch, yaw, roll in radians, and depth [68] in pixels. roi speaks of AFLW's uncropped image and is not a box.

    Raises:
        DataError: no such folder, no .mat file in it, one that is not as above, or no image beside it.
    """
    root = existing_folder(folder)
    files = sorted(root.glob("*.mat"))
    if not files:
        raise DataError(f"{root}: holds no .mat file")
    images = images_of(root)
    records = []
    for file in files:
        content = load_mat(file)
        solid = matrix(f"{file}: pt3d_68", content.get("pt3d_68"), (3, 68))
        pose = matrix(f"{file}: Pose_Para", content.get("Pose_Para"), (1, 7))[0, :3]
        if not (np.isfinite(pose).all() and np.isfinite(solid).all()):
            raise DataError(f"{file}: pt3d_68 or Pose_Para is not finite")
        points = points_of(str(file), solid[:2].T - 1)
        attributes = dict(zip(("pitch", "yaw", "roll"), pose.tolist(), strict=True)) | {
            "depth": solid[2].astype(np.float32)
        }
        seen = np.ones(68, dtype=bool)
        image = image_beside(file, images)
        records.append(Record(image, points, seen, source="aflw2000", name=file.stem, attributes=attributes))
    return Records(records)
