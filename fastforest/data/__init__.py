"""Faces with landmarks: files, datasets, drawn faces, augmentation. Faces with scores, label distributions.

Points are (x, y) in the pixels of the image at hand, 0-based, pixel centres at integers. A landmark that is unknown is NaN
in both coordinates.
"""

from .augment import Augment, Plain, horizontal_flip
from .cache import Cached, DiskCache
from .crop import Crop, crop_box
from .errors import DataError
from .faces import CropPackage, Face, SyntheticFaces, open_dataset, rescale, resize, split
from .layout import FLIP_68, LINES_68, REGIONS_68, Layout, layout_of
from .ldl import DistributionSet, read_distributions, read_distributions_folder, synthetic_distributions
from .loader import FaceLoader
from .pts import read_image, read_pts, write_pts
from .readers import (
    read_aflw2000,
    read_bioid,
    read_coco,
    read_cofw,
    read_cofw68,
    read_dlib,
    read_ibug,
    read_imm,
    read_keypoints_csv,
    read_lfpw35,
    read_ljson,
    read_muct,
    read_records,
    read_scut,
    read_wflw,
)
from .recordfaces import RecordFaces
from .records import Record, Records, open_record_image
from .scored import ScoredFaces, face_score, read_scored_faces, synthetic_scored_faces
from .shapes import ShapePCA, Similarity, generalized_procrustes, procrustes
from .synthetic import draw_face, mean_shape_68

__all__ = [
    "FLIP_68",
    "LINES_68",
    "REGIONS_68",
    "Augment",
    "Cached",
    "Crop",
    "CropPackage",
    "DataError",
    "DiskCache",
    "DistributionSet",
    "Face",
    "FaceLoader",
    "Layout",
    "Plain",
    "Record",
    "RecordFaces",
    "Records",
    "ScoredFaces",
    "ShapePCA",
    "Similarity",
    "SyntheticFaces",
    "crop_box",
    "draw_face",
    "face_score",
    "generalized_procrustes",
    "horizontal_flip",
    "layout_of",
    "mean_shape_68",
    "open_dataset",
    "open_record_image",
    "procrustes",
    "read_aflw2000",
    "read_bioid",
    "read_coco",
    "read_cofw",
    "read_cofw68",
    "read_distributions",
    "read_distributions_folder",
    "read_dlib",
    "read_ibug",
    "read_image",
    "read_imm",
    "read_keypoints_csv",
    "read_lfpw35",
    "read_ljson",
    "read_muct",
    "read_pts",
    "read_records",
    "read_scored_faces",
    "read_scut",
    "read_wflw",
    "rescale",
    "resize",
    "split",
    "synthetic_distributions",
    "synthetic_scored_faces",
    "write_pts",
]
