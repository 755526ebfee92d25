"""Faces with landmarks: files, datasets, drawn faces, augmentation. Faces with scores, label distributions.

Points are (x, y) in the pixels of the image at hand, 0-based, pixel centres at integers.
"""

from .augment import Augment, Plain, horizontal_flip
from .errors import DataError
from .faces import Cached, CropPackage, Face, PtsFolder, SyntheticFaces, crop_box, open_dataset, rescale, resize, split
from .layout import FLIP_68, LINES_68, REGIONS_68
from .ldl import DistributionSet, read_distributions, read_distributions_folder, synthetic_distributions
from .pts import read_image, read_pts, write_pts
from .scored import ScoredFaces, face_score, read_scored_faces, synthetic_scored_faces
from .synthetic import draw_face, mean_shape_68

__all__ = [
    "FLIP_68",
    "LINES_68",
    "REGIONS_68",
    "Augment",
    "Cached",
    "CropPackage",
    "DataError",
    "DistributionSet",
    "Face",
    "Plain",
    "PtsFolder",
    "ScoredFaces",
    "SyntheticFaces",
    "crop_box",
    "draw_face",
    "face_score",
    "horizontal_flip",
    "mean_shape_68",
    "open_dataset",
    "read_distributions",
    "read_distributions_folder",
    "read_image",
    "read_pts",
    "read_scored_faces",
    "rescale",
    "resize",
    "split",
    "synthetic_distributions",
    "synthetic_scored_faces",
    "write_pts",
]
