"""MATLAB files: arrays up to version 7.2 through scipy, images in cells of version 7.3 (HDF5) through h5py."""

from __future__ import annotations

import io
import math
import os
import struct
import zlib
from functools import lru_cache
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from PIL import Image

from .errors import DataError, one_line
from .text import PathLike

__all__ = ["image_cell", "is_hdf5", "load_mat", "open_hdf5", "read_member"]

IMAGE_CELLS = ("IsTr", "IsT")
"""Names of the cell array of images in COFW's files: training, test."""

MATRIX, COMPRESSED = 14, 15
ELEMENT_TYPES = frozenset({*range(1, 8), 9, *range(12, 19)})
"""Type codes of data elements: integers, single (7), double (9), 64 bits, matrix, compressed, Unicode."""

CELL, STRUCT, CHAR, SPARSE = 1, 2, 4, 5
ARRAYS, OBJECTS = frozenset(range(4, 16)), frozenset({3, 16, 17})
"""Class codes of arrays: text, sparse, numbers; of objects, functions, what MATLAB keeps to itself."""

OPEN_FILES = 4  # COFW has two; more would be other copies of them


def load_mat(path: PathLike, *, simplify: bool = False) -> dict[str, Any]:
    """The variables of a MATLAB file (up to version 7.2). simplify: structs as dicts, arrays without their ones.

    Raises:
        DataError: file missing or unreadable, not MATLAB's, or of version 7.3; or scipy is not installed.
    """
    try:
        from scipy.io import loadmat
    except ImportError:
        raise DataError(f"{path}: MATLAB files need scipy, install it: pip install scipy") from None
    try:
        with open(path, "rb") as file:
            content = file.read()
        _check_tags(content)
        return loadmat(io.BytesIO(content), simplify_cells=simplify)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise DataError(f"{path}: is a folder, not a MATLAB file") from None
    except NotImplementedError:
        raise DataError(f"{path}: is a MATLAB 7.3 file, save it with -v7") from None
    except Exception as error:
        # scipy raises many kinds on files that are cut or were never MATLAB's
        raise DataError(f"{path}: not a MATLAB file that can be read: {one_line(error)}") from error


def is_hdf5(path: PathLike) -> bool:
    """Whether the file is HDF5, as MATLAB 7.3 writes after a block of 512 bytes of its own."""
    try:
        with open(path, "rb") as file:
            head = file.read(520)
    except OSError:
        return False
    return b"\x89HDF\r\n\x1a\n" in (head[:8], head[512:])


def open_hdf5(path: PathLike) -> Any:
    """The file, opened for reading with h5py. A process keeps the last few open; a forked one opens its own.

    Raises:
        DataError: file missing, or not HDF5.
    """
    if not Path(path).is_file():
        raise DataError(f"{path}: {'is a folder, not a MATLAB file' if Path(path).is_dir() else 'no such file'}")
    try:
        status = os.stat(path)
        return _opened(os.fspath(path), os.getpid(), status.st_mtime_ns, status.st_size)
    except Exception as error:
        # h5py raises OSError, RuntimeError, KeyError, ... on files that are cut
        raise DataError(f"{path}: not a MATLAB 7.3 file that can be read: {one_line(error)}") from error


def image_cell(path: PathLike) -> Any:
    """The references to the images of a file, an object array [N].

    Raises:
        DataError: as `open_hdf5`, or no cell array of the names in `IMAGE_CELLS`.
    """
    file = open_hdf5(path)
    try:
        name = next((name for name in IMAGE_CELLS if name in file), None)
        references = None if name is None else np.asarray(file[name][()])
    except Exception as error:
        raise DataError(f"{path}: its images cannot be listed: {one_line(error)}") from error
    if references is None:
        raise DataError(f"{path}: has no cell array of images named {' or '.join(IMAGE_CELLS)}")
    if references.dtype.kind != "O" or references.size == 0:
        raise DataError(f"{path}: {name} must be a cell array of images, got {references.dtype}")
    return references.ravel()


def read_member(path: PathLike, member: int) -> Image.Image:
    """Image number `member`, from 0, of a COFW file: a Pillow image of mode RGB.

    MATLAB stores columns first, so that h5py sees [W, H] where it wrote [H, W], and [3, W, H] for colour.

    Raises:
        DataError: as `image_cell`; no such image; an image that is neither grey nor colour, or cannot be read.
    """
    references = image_cell(path)
    if not 0 <= member < len(references):
        raise DataError(f"{path}: has no image {member}, it holds {len(references)}")
    try:
        pixels = np.asarray(open_hdf5(path)[references[member]][()])
    except Exception as error:
        raise DataError(f"{path}: image {member} cannot be read: {one_line(error)}") from error
    grey, colour = pixels.ndim == 2, pixels.ndim == 3 and pixels.shape[0] == 3
    if pixels.dtype != np.uint8 or 0 in pixels.shape or not (grey or colour):
        raise DataError(
            f"{path}: image {member} must be uint8 [W, H] or [3, W, H], got {pixels.dtype} {list(pixels.shape)}"
        )
    return Image.fromarray(np.ascontiguousarray(pixels.T)).convert("RGB")


def _check_tags(content: bytes) -> None:
    """Raises ValueError where a file of version 5 to 7.2 has data elements that do not make up the arrays they say.

    On those scipy (1.17) may read through a null pointer instead of raising, and the process is gone.
    """
    order, major = ("<", content[125:126]) if content[126:128] == b"IM" else (">", content[124:125])
    # version 4 has a zero there; 7.3, whose major number is 2, scipy refuses by itself
    if 0 not in content[:4] and major == b"\x01":
        _check_elements(memoryview(content)[128:], order)


def _check_elements(elements: memoryview, order: str) -> list[tuple[int, memoryview]]:
    """(type, data) of the elements, one behind the other: a tag of type and size, then the data, padded to 8 bytes."""
    place, found = 0, []
    while place + 8 <= len(elements):
        kind, size = struct.unpack_from(f"{order}II", elements, place)
        start, end = place + 8, place + 8 + size
        if kind >> 16:  # the short form: size and type in one word, the data in the other
            kind, size = kind & 0xFFFF, kind >> 16
            start, end = place + 4, place + 8
        if kind not in ELEMENT_TYPES or size > len(elements) - start or (start == place + 4 and size > 4):
            raise ValueError(f"a data element has type {kind} and {size} bytes")
        if kind == COMPRESSED:
            _check_elements(memoryview(zlib.decompress(elements[start:end])), order)
        elif kind == MATRIX and size:
            _check_array(elements[start:end], order)
        found.append((kind, elements[start : start + size]))
        place = end if kind == COMPRESSED else end + -end % 8
    if place < len(elements):
        raise ValueError("the last data element is cut")
    return found


def _check_array(elements: memoryview, order: str) -> None:
    """Flags, dimensions, name, then as many elements as an array of that class has; of objects no more is known.

    The dimensions of cells and structs are held against their elements, as scipy makes room for what they say.
    """
    found = _check_elements(elements, order)
    kinds = [kind for kind, _ in found]
    flags = struct.unpack_from(f"{order}I", found[0][1])[0] if found and len(found[0][1]) >= 4 else 0
    kind, parts, content = flags & 0xFF, 2 if flags & 0x800 else 1, kinds[3:]
    if kind in OBJECTS:
        return
    fits = kinds[:3] == [6, 5, 1]
    if fits and kind in (CELL, STRUCT):
        fields = 1
        if kind == STRUCT:
            fields, content = _fields(found[3:5], order), content[2:]
        count = fields * math.prod(_integers(found[1][1], order))
        fits = len(content) == count and all(part == MATRIX for part in content)
    else:
        numbers = {CHAR: 1, SPARSE: 2 + parts}.get(kind, parts)
        fits = fits and kind in ARRAYS and len(content) == numbers and MATRIX not in content
    if not fits:
        raise ValueError(f"an array of class {kind} has {len(kinds)} data elements")


def _fields(found: list[tuple[int, memoryview]], order: str) -> int:
    """How many fields a struct has, from the elements that hold the length of their names, and the names."""
    (length,) = _integers(found[0][1], order) if found else (0,)
    return len(found[1][1]) // length if length > 0 and len(found) == 2 else 0


def _integers(data: memoryview, order: str) -> tuple[int, ...]:
    return struct.unpack(f"{order}{len(data) // 4}i", data[: len(data) // 4 * 4])


@lru_cache(maxsize=OPEN_FILES)
def _opened(path: str, process: int, modified: int, size: int) -> Any:
    return h5py.File(path, "r")
