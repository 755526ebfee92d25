"""fastforest.evaluation: the figures against fastforest.metrics, unknown landmarks, files, pictures, every message."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from fastforest import data, draw, evaluation, metrics
from fastforest.data import layout_of
from fastforest.evaluation import Evaluation, evaluate

NAN = float("nan")
COUNT = 30
SIZE = 32


class Faces:
    """Noise with landmarks, as `data.Cached` gives them."""

    size = SIZE

    def __init__(self, landmarks: int = 68, count: int = COUNT) -> None:
        generator = torch.Generator().manual_seed(landmarks)
        self.points = torch.rand(count, landmarks, 2, generator=generator) * SIZE
        self.images = torch.randint(0, 256, (count, 3, SIZE, SIZE), generator=generator, dtype=torch.uint8)

    def __len__(self) -> int:
        return len(self.points)

    def batch(self, indices):
        rows = torch.as_tensor(indices)
        return self.images[rows], self.points[rows]


class Model(torch.nn.Module):
    """Predicts one shape."""

    def __init__(self, points: torch.Tensor) -> None:
        super().__init__()
        self.points = torch.nn.Parameter(points)

    def forward(self, images):
        assert not self.training and images.max() <= 1
        return self.points.expand(len(images), -1, -1)


class Unsure(Model):
    """Its covariance is the brightness of the image's red, on the diagonal."""

    def distribution(self, images):
        trace = images[:, 0].mean(dim=(1, 2))[:, None, None, None] * torch.eye(2)
        return self(images), trace.expand(-1, len(self.points), -1, -1)


@pytest.fixture(scope="module")
def found() -> Evaluation:
    return evaluate(Unsure(Faces().points.mean(dim=0)), Faces(), threshold=0.6, batch=7)


def test_figures_are_those_of_metrics(found):
    faces = Faces()
    pred = faces.points.mean(dim=0).expand(COUNT, -1, -1)
    assert found.metrics == metrics.evaluate(pred, faces.points, "inter_ocular", 0.6)
    assert 0 < found.metrics.failure_rate < 1
    errors = metrics.nme(pred, faces.points, "inter_ocular")
    assert torch.equal(found.errors, errors)
    assert torch.equal(found.truth, faces.points) and torch.equal(found.points, pred)
    regions = metrics.region_nme(pred, faces.points, "inter_ocular", data.REGIONS_68)
    assert found.regions == {name: float(values.mean()) for name, values in regions.items()}
    by_landmark = metrics.landmark_errors(pred, faces.points, "inter_ocular").mean(dim=0)
    assert torch.allclose(found.landmarks, by_landmark, rtol=1e-12)
    assert found.worst.tolist() == errors.argsort(descending=True)[:24].tolist()
    assert torch.equal(found.images, faces.images[found.worst])


def test_spread_is_the_root_mean_trace_over_the_normaliser(found):
    faces = Faces()
    trace = 2 * faces.images[:, 0].double().mean(dim=(1, 2)) / 255
    distance = metrics.normalizer_distance(faces.points, "inter_ocular")
    assert torch.allclose(found.spread, trace.sqrt() / distance, rtol=1e-6)
    assert found.doubt.aurc == metrics.aurc(found.errors, found.spread)
    assert found.doubt.oracle == metrics.aurc(found.errors, found.errors) < found.doubt.aurc
    assert found.doubt.random == pytest.approx(found.metrics.nme, rel=1e-12)
    assert found.doubt.auroc == metrics.failure_auroc(found.errors, found.spread, 0.6)
    assert found.doubt.excess == found.doubt.aurc - found.doubt.oracle


def test_predictions_instead_of_a_model(found):
    faces = Faces()
    covariance = faces.images[:, 0].float().div(255).mean(dim=(1, 2))[:, None, None, None] * torch.eye(2)
    again = evaluate((found.points.numpy(), covariance.expand(-1, 68, -1, -1)), faces, threshold=0.6)
    assert again.as_dict() == found.as_dict()
    assert evaluate((found.points, None), faces).doubt is None


def test_a_model_without_covariance_has_no_spread():
    plain = evaluate(Model(Faces().points[0]), Faces())
    assert plain.spread is None and plain.doubt is None and plain.as_dict()["failure_detection"] is None


def test_unknown_landmarks_and_faces_without_an_error():
    faces = Faces()
    faces.points[:, 3] = NAN
    faces.points[5, :17] = NAN
    faces.points[8] = NAN
    pred = Faces().points + 1.0
    pred[9, 20] = NAN
    result = evaluate((pred, torch.eye(2).expand(COUNT, 68, 2, 2)), faces, threshold=0.3)
    assert result.metrics.unknown == 29 + 16 + 68 and result.metrics.invalid == 2
    assert result.landmarks.isnan().nonzero().flatten().tolist() == [3]
    assert result.errors.isnan().nonzero().flatten().tolist() == [8, 9] == result.worst[:2].tolist()
    valid = result.errors.isfinite()
    assert result.doubt.random == pytest.approx(float(result.errors[valid].mean()))
    judged = torch.arange(COUNT) != 8  # of face 9 the prediction is to blame
    assert result.doubt.auroc == metrics.failure_auroc(result.errors[judged], result.spread[judged], 0.3)
    jaw = metrics.region_nme(pred, faces.points, "inter_ocular", data.REGIONS_68)["jaw"]
    assert jaw.isnan().nonzero().flatten().tolist() == [5, 8]
    assert result.regions["jaw"] == pytest.approx(float(jaw.nanmean()))
    assert "113 unknown landmarks left out; model: 2 without an NME: failures, not in the mean." in result.markdown()


def test_a_face_without_a_normaliser_is_no_failure_that_the_spread_finds():
    faces, known = Faces(), slice(0, 20)
    pred, covariance = faces.points.clone(), torch.eye(2).expand(COUNT, 68, 2, 2)
    pred[:4] += 9.0
    faces.points[20:, 36] = NAN
    found = evaluate((pred, covariance), faces)
    assert found.metrics.invalid == 10 and found.spread[20:].isnan().all()
    assert found.doubt.auroc == metrics.failure_auroc(found.errors[known], found.spread[known], 0.08)
    assert found.doubt.auroc < metrics.failure_auroc(found.errors, found.spread, 0.08) - 0.1


@pytest.mark.parametrize("landmarks", [98, 29, 19, 7])
def test_other_numbers_of_landmarks(landmarks, tmp_path):
    faces = Faces(landmarks)
    result = evaluate((faces.points + 0.5, None), faces)
    layout = layout_of(landmarks)
    assert list(result.regions) == (list(layout.regions) if layout else [])
    assert result.metrics.normalizer == ("inter_ocular" if landmarks in (98, 29) else "box")
    result.write(tmp_path)
    assert (tmp_path / "regions.png").exists() == (landmarks != 7)
    mine = evaluate((faces.points + 0.5, None), faces, "box", regions={"first": [0, 1]})
    assert list(mine.regions) == ["first"]


def test_eye_corners_are_those_of_the_literature():
    assert metrics.OUTER_EYE_CORNERS == {68: (36, 45), 98: (60, 72), 29: (8, 9)}


def test_files(found, tmp_path):
    found.write(tmp_path / "new" / "results", "mine", "noise")
    folder = tmp_path / "new" / "results"
    names = ["ced.png", "faces.jsonl", "regions.png", "results.json", "results.md", "risk_coverage.png", "worst.png"]
    assert sorted(path.name for path in folder.iterdir()) == names
    results = json.loads((folder / "results.json").read_text())
    assert results == {"mine": found.as_dict()}
    assert results["mine"]["NME[inter_ocular]"] == found.metrics.nme
    assert results["mine"]["regions"]["eyes"] == found.regions["eyes"]
    assert list(results["mine"]["failure_detection"]) == ["AURC", "oracle", "random", "excess", "AUROC@0.6"]
    lines = [json.loads(line) for line in (folder / "faces.jsonl").read_text().splitlines()]
    assert [line["name"] for line in lines] == [str(index) for index in range(COUNT)]
    assert [line["nme"] for line in lines] == found.errors.tolist()
    assert np.allclose(lines[4]["points"], found.points[4]) and np.allclose(lines[4]["truth"], found.truth[4])
    text = (folder / "results.md").read_text()
    assert text.startswith("# noise\n") and f"| mine | {100 * found.metrics.nme:.2f} % |" in text
    assert "| NME[inter_ocular] of | jaw | brows | nose | eyes | mouth |" in text
    for name in names:
        if name.endswith(".png"):
            assert f"]({name})" in text
            picture = data.read_image(folder / name)
            assert picture.std() > 10
    assert data.read_image(folder / "worst.png").shape == (30 + 4 * 196, 4 + 6 * 196, 3)


def test_figures_that_are_not_finite_are_null(tmp_path):
    faces = Faces(count=3)
    result = evaluate((torch.full_like(faces.points, NAN), torch.eye(2).expand(3, 68, 2, 2)), faces)
    assert result.doubt is None and math.isnan(result.metrics.nme)
    result.write(tmp_path)
    assert json.loads((tmp_path / "results.json").read_text())["model"]["NME[inter_ocular]"] is None
    assert json.loads((tmp_path / "faces.jsonl").read_text().splitlines()[0])["nme"] is None
    assert "| model | - | 100.00 % | 0.00 % |" in (tmp_path / "results.md").read_text()


def test_several_models_share_tables_and_plots(found, tmp_path):
    other = evaluate(Model(Faces().points[0]), Faces(), threshold=0.6)
    evaluation.write(tmp_path, {"unsure": found, "plain": other}, "two")
    pictures = ["ced", "regions", "risk_coverage", "worst_plain", "worst_unsure"]
    assert sorted(path.stem for path in tmp_path.glob("*.png")) == pictures
    text = (tmp_path / "results.md").read_text()
    assert text.count("| unsure | ") == 3 and text.count("| plain | ") == 2
    assert len((tmp_path / "faces.jsonl").read_text().splitlines()) == 2 * COUNT
    alone = draw.ced_figure({"unsure": found.errors}, "inter_ocular", 0.6, "two")
    assert (data.read_image(tmp_path / "ced.png") != alone).any()


def test_errors():
    faces = Faces()
    points = faces.points
    with pytest.raises(ValueError, match="evaluate: names must hold 30, one a face, got 2"):
        evaluate((points, None), faces, names=["a", "b"])
    with pytest.raises(ValueError, match=r"evaluate: points must be \[30, 68, 2\], got \[29, 68, 2\]"):
        evaluate((points[1:], None), faces)
    with pytest.raises(ValueError, match=r"evaluate: covariance must be \[30, 68, 2, 2\], got \[30, 68, 2\]"):
        evaluate((points, points), faces)
    with pytest.raises(ValueError, match="kind must be one of inter_ocular"):
        evaluate((points, None), faces, "iod")
    with pytest.raises(ValueError, match=r"region_nme: regions\['ear'\]"):
        evaluate((points, None), faces, regions={"ear": [68]})


def test_write_refuses_figures_that_cannot_be_compared(found, tmp_path):
    other = evaluate((found.points, None), Faces(), "box")
    with pytest.raises(
        ValueError, match=r"write: b must have normaliser inter_ocular and threshold 0.6, got box and 0.08"
    ):
        evaluation.write(tmp_path / "out", {"a": found, "b": other})
    with pytest.raises(ValueError, match="write: evaluations must hold at least one, got none"):
        evaluation.write(tmp_path / "out", {})
    assert not (tmp_path / "out").exists()
