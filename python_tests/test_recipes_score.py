"""Faces with scores, and the recipe that learns them."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from fastforest import data
from fastforest.data import scored
from fastforest.recipes import score

TINY = score.ScoreRecipe(
    size=32, width=4, code=8, half_period=2, cycles=2, batch=16, trees=2, depth=3, units=16, update_every=5
)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# faces


def test_a_drawn_score_is_a_function_of_seed_and_index():
    long, part = data.synthetic_scored_faces(6, 32, seed=2), data.synthetic_scored_faces(2, 32, seed=2, start=3)
    for a, b in zip(long, part, strict=True):
        assert torch.equal(a[3:5], b)
    image, points = data.draw_face(2, 4, 32)
    assert np.array_equal(part.images[1].permute(1, 2, 0).numpy(), image)
    assert float(part.truth[1]) == pytest.approx(data.face_score(points.astype(np.float64)), abs=1e-6)
    assert not torch.equal(long.first, data.synthetic_scored_faces(6, 32, seed=3).first)


def test_the_score_is_of_the_face_not_of_its_place():
    _, points = data.draw_face(0, 5, 64)
    points = points.astype(np.float64)
    turn = np.array([[0.8, 0.6], [-0.6, 0.8]])
    assert data.face_score(3 * points @ turn + 7) == pytest.approx(data.face_score(points), abs=1e-9)
    mirrored = (points * (-1, 1))[list(data.FLIP_68)]
    assert data.face_score(mirrored) == pytest.approx(data.face_score(points), abs=1e-9)
    opened = points.copy()
    opened[57] += 0.1 * (points[57] - points[27])
    assert data.face_score(opened) > data.face_score(points) + 0.05


def test_annotators_noise_and_scales():
    generator = np.random.default_rng(0)
    _, points = data.draw_face(0, 8, 64)
    points = points.astype(np.float64)
    seen = np.array([scored._annotated(points, generator.standard_normal(2)) for _ in range(3000)])
    k, b = data.scored.SECOND_GROUP
    truth = data.face_score(points)
    assert seen[:, 2] == pytest.approx(truth)
    assert seen[:, 0].mean() == pytest.approx(truth, abs=0.03)
    assert seen[:, 1].mean() == pytest.approx(k * truth + b, abs=0.03)
    assert seen[:, 1].std() == pytest.approx(scored.SECOND_NOISE[0], rel=0.1)


@pytest.fixture
def folder(tmp_path):
    for index in range(3):
        Image.fromarray(data.draw_face(0, index, 40)[0]).save(tmp_path / f"{index}.png")
    (tmp_path / "scores.csv").write_text("image,score,second\n0.png,3.5,2.5\n1.png,1,\n2.png,,4\n")
    return tmp_path


def test_a_table_of_scores_is_read(folder):
    found = data.read_scored_faces(folder, 32)
    assert found.images.shape == (3, 3, 32, 32) and found.images.dtype == torch.uint8
    assert found.first[:2].tolist() == [3.5, 1.0] and math.isnan(found.first[2])
    assert found.second[[0, 2]].tolist() == [2.5, 4.0] and math.isnan(found.second[1])
    assert found.truth.isnan().all()


@pytest.mark.parametrize(
    "table, complaint",
    [
        (None, "no such file"),
        ("", "the first line must be"),
        ("name,score\n0.png,3\n", "the first line must be"),
        ("image,score\n", "holds no images"),
        ("image,score\n0.png,3,4\n", "line 2 has 3 fields, not 2"),
        ("image,score\n0.png,6\n", "line 2: a score must be a number from 1 to 5, got '6'"),
        ("image,score\n0.png,good\n", "got 'good'"),
        ("image,score\nnone.png,3\n", "none.png: no such file"),
    ],
)
def test_unusable_tables_are_told_in_a_line(folder, capsys, table, complaint):
    if table is None:
        (folder / "scores.csv").unlink()
    else:
        (folder / "scores.csv").write_text(table)
    assert score.main(["--data", str(folder), "--out", str(folder / "out")]) == 2
    captured = capsys.readouterr()
    assert complaint in captured.err and captured.err.count("\n") == 1 and not (folder / "out").exists()


def test_too_few_scores(folder, capsys):
    assert score.main(["--data", str(folder), "--out", str(folder / "out")]) == 2
    assert "has 2 faces with scores, needs at least 20" in capsys.readouterr().err


# pieces


def test_the_schedule_starts_and_ends_at_its_minimum():
    rates = [score.cosine_from_minimum(step, 10, 2, 0.1, 1.0) for step in range(50)]
    assert rates[0] == rates[20] == rates[40] == rates[49] == pytest.approx(0.1)
    assert rates[10] == rates[30] == pytest.approx(1.0) and max(rates) == pytest.approx(1.0)
    assert rates[:11] == sorted(set(rates[:11]))


def test_quantiles_of_a_grid():
    centres = torch.linspace(1, 5, 5)
    prob = torch.tensor([[0.2, 0.2, 0.2, 0.2, 0.2], [0.0, 0.0, 1.0, 0.0, 0.0]])
    found = score.grid_quantiles(prob, centres, (0.05, 0.5, 0.95))
    torch.testing.assert_close(found, torch.tensor([[0.75, 3.0, 5.25], [2.55, 3.0, 3.45]]))


@pytest.mark.parametrize("name", score.HEADS)
def test_every_head_learns_from_its_features(name):
    torch.manual_seed(0)
    features = torch.randn(400, 8)
    scores = 3 + 1.5 * torch.tanh(features[:, 0])
    head = score.HEADS[name](8, TINY)
    head.start(features, scores)
    descent = torch.optim.Adam(head.parameters(), 0.05)
    for _ in range(60):
        descent.zero_grad()
        head.loss(features, scores).backward()
        descent.step()
    head.eval()
    with torch.no_grad():
        head.finish(features, scores)
        pred, quantiles = head.predict(features)
    assert float((pred - scores).abs().mean()) < 0.5 * float((scores - scores.mean()).abs().mean())
    if quantiles is not None:
        assert quantiles.shape == (400, 4) and bool((quantiles.diff(dim=1) >= 0).all())
    assert (quantiles is None) == name.startswith("regression")


# the recipe


def test_a_run_writes_what_it_promises(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(score, "ScoreRecipe", lambda: TINY)
    out = tmp_path / "out"
    assert score.main(["--out", str(out), "--faces", "120", "--seed", "1"]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["results.json", "results.md", "score.png"]
    summary = json.loads((out / "results.json").read_text())
    assert list(summary["heads"]) == list(score.HEADS) and (summary["train"], summary["held_out"]) == (96, 24)
    for head, row in summary["heads"].items():
        assert row["mae"] < 1.5 * summary["mean score"]["mae"], head
        assert row["second_after"] < 2 and row["k"] is not None
        assert ("cover_90" in row) == (not head.startswith("regression"))
    assert summary["true score"]["mae"] < summary["mean score"]["mae"] / 2
    assert "| Gaussian forest |" in (out / "results.md").read_text()
    assert "written to" in capsys.readouterr().out
