"""fastforest.data.matlab: files that make scipy read through a null pointer are refused."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from formats import written
from scipy.io import savemat

from fastforest.data import DataError, read_cofw
from fastforest.data.matlab import is_hdf5, load_mat


def test_matlab_elements_that_do_not_make_up_their_array(tmp_path: Path) -> None:
    path = tmp_path / "a.mat"
    savemat(path, {"Points": np.ones((3, 2)), "cell": np.array([[{"a": 1.0}]], dtype=object)})
    content = path.read_bytes()
    assert load_mat(path)["Points"].sum() == 6
    double = struct.pack("<II", 9, 48)
    for damaged, message in (
        (content.replace(double, struct.pack("<II", 38, 48)), "a data element has type 38 and 48 bytes"),
        (content.replace(double, struct.pack("<II", 9, 1 << 30)), "a data element has type 9 and 1073741824 bytes"),
        (content[:144] + b"\x26" + content[145:], "an array of class 38 has 4 data elements"),
        (content[:144] + b"\x05" + content[145:], "an array of class 5 has 4 data elements"),
        (content[:145] + b"\x08" + content[146:], "an array of class 6 has 4 data elements"),
        (content[:144] + b"\x01" + content[145:], "an array of class 1 has 4 data elements"),
        (content[:-4], "a data element has type 14 and "),
        (content + b"\0" * 4, "the last data element is cut"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=rf"a\.mat: not a MATLAB file that can be read: {message}"):
            load_mat(path)


@pytest.mark.parametrize("options", [{"do_compression": True}, {"format": "4"}], ids=["compressed", "version-4"])
def test_matlab_files_that_are_whole(tmp_path: Path, options: dict[str, Any]) -> None:
    content = {"a": np.arange(6.0).reshape(3, 2), "text": "word", "hard": np.array([[1 + 2j]]), "no": np.zeros((0, 0))}
    savemat(tmp_path / "a.mat", content, **options)
    found = load_mat(tmp_path / "a.mat")
    assert np.array_equal(found["a"], content["a"]) and found["text"] == ["word"] and found["hard"] == 1 + 2j
    assert found["no"].size == 0


def test_matlab_files_of_version_7_3_are_no_older_ones(tmp_path: Path) -> None:
    path = written("cofw", tmp_path)
    with open(path, "r+b") as file:
        file.write(b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM")
    assert is_hdf5(path) and len(read_cofw(path)) == 2
    with pytest.raises(DataError, match=r"COFW_train\.mat: is a MATLAB 7\.3 file"):
        load_mat(path)


def test_matlab_files_of_the_other_byte_order(tmp_path: Path) -> None:
    parts = [struct.pack(">IIII", 6, 8, 6, 0), struct.pack(">IIii", 5, 8, 1, 2), struct.pack(">HH4s", 1, 1, b"x")]
    body = b"".join(parts) + struct.pack(">IIdd", 9, 16, 0.5, -3.0)
    content = b"MATLAB".ljust(124) + b"\x01\x00MI" + struct.pack(">II", 14, len(body)) + body
    (tmp_path / "a.mat").write_bytes(content)
    assert load_mat(tmp_path / "a.mat")["x"].tolist() == [[0.5, -3.0]]
    (tmp_path / "a.mat").write_bytes(content.replace(struct.pack(">II", 9, 16), struct.pack(">II", 10, 16)))
    with pytest.raises(DataError, match="a data element has type 10 and 16 bytes"):
        load_mat(tmp_path / "a.mat")
