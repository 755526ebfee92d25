"""The recipe of dense landmarks: what it decodes, what it writes, what it refuses."""

from __future__ import annotations

import json
import math
import sys

import pytest
import torch
from PIL import Image

import fastforest as ff
from fastforest import data
from fastforest.data import dense as dense_data
from fastforest.recipes import dense

TINY = dense.DenseRecipe(
    size=32,
    landmarks=98,
    faces=60,
    steps=12,
    batch=4,
    unet={"width": 4, "levels": 3, "features": 8},
    resnet={"width": 4, "blocks": (1, 1, 1, 1)},
    shown=3,
)
FILES = ["errors.png", "heatmaps.png", "predictions.png", "results.json", "results.md"]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("sigma", [3.0, 7.0])
@pytest.mark.parametrize("loss", ["MSE", "KL", "Adaptive Wing"])
def test_every_decoding_finds_the_points_of_perfect_maps(loss, sigma):
    generator = torch.Generator().manual_seed(0)
    points = 20 + 24 * torch.rand(4, 20, 2, generator=generator)
    maps = ff.render_gaussian(points, sigma, (64, 64))
    if loss == "KL":
        maps = maps.double().clamp_min(1e-300).log().float() + 5 * torch.randn(4, 20, 1, 1, generator=generator)
    # Half and a quarter of a pixel's diagonal; softmax of a broad map is cut by its window, or by the canvas.
    bounds = {"argmax": 0.71, "quarter shift": 0.36, "DARK": 1e-3, "DARK-UDP": 1e-3}
    for decoding, decode in dense.DECODINGS.items():
        found = decode(maps, dense.Way(loss, sigma, TINY.beta))
        error = (found - points).norm(dim=-1).max()
        assert error < bounds.get(decoding, 0.08), decoding


@pytest.mark.parametrize("way", [("MSE", 3.0), ("KL", 3.0), ("Adaptive Wing", 3.0), ("MSE", 7.0)])
def test_the_losses_of_maps_are_least_at_the_target(way):
    loss, sigma = way
    points = torch.tensor([[[11.3, 8.6], [20.0, 14.5]]])
    target = ff.render_gaussian(points, sigma, (24, 32))
    maps = target.double().log().float() if loss == "KL" else target
    value = dense.LOSSES[loss](maps, points, sigma)
    assert float(value) == pytest.approx(0, abs=1e-5)
    assert float(dense.LOSSES[loss](maps + 0.1 * torch.rand(1, 2, 24, 32), points, sigma)) > float(value)


def test_a_run_writes_what_it_promises(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(dense, "DenseRecipe", lambda: TINY)
    out = tmp_path / "out"
    assert dense.main(["--out", str(out), "--steps", "80"]) == 0
    assert sorted(path.name for path in out.iterdir()) == FILES
    summary = json.loads((out / "results.json").read_text())
    assert (summary["train"], summary["held_out"], summary["normalizer"]) == (54, 6, "inter_ocular")
    reader = summary["reader"]
    assert reader is None or (reader["images_a_second"] > 0 and reader["table_rows"] == 54)
    rows = summary["trainings"]
    assert list(rows) == [
        "coordinates, wing",
        "coordinates, L1",
        *(f"{loss}, sigma {sigma}" for sigma in (3, 7) for loss in ("MSE", "KL", "Adaptive Wing")),
    ]
    for way, row in rows.items():
        assert row["steps"] == 80 and row["seconds_a_step"] > 0, way
        # Coordinates start at the mean shape, which takes long to better; maps start at nothing.
        assert row["last_loss"] < (0.99 if row["sigma"] is None else 0.9) * row["first_loss"], way
        assert row["peak_megabytes"] is None or row["peak_megabytes"] >= 0
        wanted = ["coordinates"] if way.startswith("coordinates") else list(dense.DECODINGS)
        assert list(row["decodings"]) == wanted
        for errors in row["decodings"].values():
            assert 0 < errors["mse"] < 2 * 32**2 and 0 < errors["nme"] < 10
    table = (out / "results.md").read_text()
    lines = [line for line in table.splitlines() if line.startswith("| ")]
    assert len(lines) == 10 and len({line.count("|") for line in lines}) == 1
    for picture in FILES[:3]:
        with Image.open(out / picture) as image:
            assert image.mode == "RGB" and min(image.size) > 300 and len(set(image.resize((40, 40)).getdata())) > 50
    captured = capsys.readouterr().out
    assert "written to" in captured and "Adaptive Wing, sigma 7: 80 steps" in captured


def test_a_run_repeats_itself(tmp_path):
    first, second = (dense.run("synthetic", tmp_path / name, 3, TINY)["trainings"] for name in "ab")
    for way, row in first.items():
        assert row["decodings"] == second[way]["decodings"] and row["last_loss"] == second[way]["last_loss"], way


def test_a_table_is_trained_on_as_it_stands(tmp_path):
    pytest.importorskip("pyarrow")
    faces = data.SyntheticFaces(20, 32)
    table = dense_data.write_csv([face._replace(points=face.points[:30]) for face in faces], tmp_path / "faces.csv")
    summary = dense.run(str(table), tmp_path / "out", 0, TINY)
    assert summary["normalizer"] == "box" and summary["recipe"]["landmarks"] == 30
    assert (summary["train"], summary["held_out"], summary["reader"]["table_rows"]) == (18, 2, 20)


def test_minutes_end_a_training_and_drawn_faces_need_no_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    recipe = dense.replace(TINY, minutes=1e-6)
    summary = dense.run("synthetic", tmp_path / "out", 0, recipe)
    assert {row["steps"] for row in summary["trainings"].values()} == {1} and summary["reader"] is None
    assert "not measured, pyarrow is missing" in (tmp_path / "out" / "results.md").read_text()


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (["--size", "36"], "--size 36: must be a multiple of 8"),
        (["--landmarks", "67"], "--landmarks 67: must be at least 68"),
        (["--data", "none.csv"], "none.csv: no such file"),
        (["--data", "nowhere"], "nowhere: no such folder"),
        (["--steps", "1", "--minutes", "1"], "not allowed with argument"),
    ],
)
def test_what_cannot_be_run_is_told_in_a_line(tmp_path, capsys, arguments, complaint):
    pytest.importorskip("pyarrow")
    try:
        code = dense.main(["--out", str(tmp_path / "out"), *arguments])
    except SystemExit as stopped:
        code = stopped.code
    captured = capsys.readouterr()
    assert code == 2 and complaint in captured.err and captured.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(dense, "DenseRecipe", lambda: TINY)
    monkeypatch.setitem(dense.LOSSES, "wing", lambda pred, points: pred.sum() * math.nan)
    assert dense.main(["--out", str(tmp_path / "out")]) == 2
    assert "coordinates, wing: the loss is nan" in capsys.readouterr().err


def test_the_full_setting_is_one_flag(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(
        dense, "run", lambda *arguments, **_: seen.append(arguments[3]) or (_ for _ in ()).throw(OSError)
    )
    dense.main(["--out", str(tmp_path), "--full", "--steps", "7"])
    assert seen == [dense.replace(dense.FULL, steps=7)]
    assert (dense.FULL.landmarks, dense.FULL.size, dense.FULL.batch) == (971, 128, 32)
