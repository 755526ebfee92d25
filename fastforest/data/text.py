"""Files as bytes, text and lines, each with an error that names the file."""

from __future__ import annotations

import os
from pathlib import Path

from .errors import DataError, one_line

__all__ = ["PathLike", "read_bytes", "read_lines", "read_text"]

PathLike = str | os.PathLike[str]


def read_bytes(path: PathLike) -> bytes:
    """The content of a file. Raises DataError."""
    try:
        return Path(path).read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise DataError(f"{path}: is a folder, not a file") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read: {one_line(error)}") from error


def read_text(path: PathLike) -> str:
    """A file of UTF-8, with or without the mark at its head. Raises DataError, also on an empty file."""
    try:
        text = read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise DataError(f"{path}: not a text file") from None
    if not text.strip():
        raise DataError(f"{path}: is empty")
    return text


def read_lines(path: PathLike) -> list[tuple[str, str]]:
    """(where, line) of each line that is not blank, stripped. Raises DataError."""
    lines = enumerate(read_text(path).splitlines(), start=1)
    return [(f"{path}: line {number}", line.strip()) for number, line in lines if line.strip()]
