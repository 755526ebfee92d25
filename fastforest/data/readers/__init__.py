"""Readers: the annotations of public sets, as they are distributed, as `Records`. No image is decoded.

A reader names the file and the place in it in every `DataError`; what its coordinates count from, and what was done about
it, stands in its docstring.
"""

from .aflw2000 import read_aflw2000
from .coco import read_coco
from .cofw import read_cofw, read_cofw68
from .dlib import read_dlib
from .ibug import read_ibug
from .menpo import read_ljson
from .recognise import read_records
from .small import read_bioid, read_imm, read_lfpw35, read_scut
from .tables import read_keypoints_csv, read_muct
from .wflw import read_wflw

__all__ = [
    "read_aflw2000",
    "read_bioid",
    "read_coco",
    "read_cofw",
    "read_cofw68",
    "read_dlib",
    "read_ibug",
    "read_imm",
    "read_keypoints_csv",
    "read_lfpw35",
    "read_ljson",
    "read_muct",
    "read_records",
    "read_scut",
    "read_wflw",
]
