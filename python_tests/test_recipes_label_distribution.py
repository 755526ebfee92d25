"""Label-distribution sets, the measures, and the recipe."""

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.io import savemat

from fastforest import data, measures
from fastforest.recipes import label_distribution as recipe

RNG = np.random.default_rng(0)
FEATURES = RNG.standard_normal((12, 4))
LABELS = RNG.dirichlet(np.ones(3), 12)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def write(folder, name="set.mat", **variables):
    path = folder / name
    savemat(path, variables)
    return path


# reading


def test_a_matlab_file_is_read_and_normalised(tmp_path):
    labels = LABELS.copy()
    labels[3] *= 0.5
    path = write(tmp_path, features=FEATURES.astype(np.float32), labels=labels, age=np.arange(12))
    found = data.read_distributions(path)
    assert found.name == "set" and found.renormalised == 1
    assert found.features.dtype == found.labels.dtype == torch.float32
    torch.testing.assert_close(found.labels.numpy(), LABELS.astype(np.float32), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.features.numpy(), FEATURES.astype(np.float32))


def test_a_folder_is_read_by_name(tmp_path):
    for name in ("b.mat", "a.mat"):
        write(tmp_path, name, features=FEATURES, labels=LABELS)
    assert [found.name for found in data.read_distributions_folder(tmp_path)] == ["a", "b"]


BROKEN = LABELS.copy()
BROKEN[5, 1] = np.nan
NEGATIVE = LABELS.copy()
NEGATIVE[2, 0] = -0.1
EMPTY = LABELS.copy()
EMPTY[7] = 0


@pytest.mark.parametrize(
    "variables, complaint",
    [
        ({"features": FEATURES}, "has no variable 'labels', it holds features"),
        ({"features": FEATURES[:5], "labels": LABELS}, "has 5 rows of features, but 12 of labels"),
        ({"features": FEATURES, "labels": BROKEN}, "labels of row 5 are not finite"),
        ({"features": FEATURES, "labels": NEGATIVE}, "labels must not be negative, row 2 is"),
        ({"features": FEATURES, "labels": EMPTY}, "labels of row 7 sum to 0"),
        ({"features": FEATURES, "labels": LABELS[:, :1]}, "at least 2 classes, got 1"),
        ({"features": "words", "labels": LABELS}, "features must be a matrix of numbers"),
        ({"features": FEATURES[None].repeat(2, 0), "labels": LABELS}, "features must be a matrix of numbers"),
    ],
)
def test_unusable_variables_are_told_in_a_line(tmp_path, variables, complaint):
    path = write(tmp_path, **variables)
    with pytest.raises(data.DataError) as error:
        data.read_distributions(path)
    assert complaint in str(error.value) and str(error.value).startswith(str(path)) and "\n" not in str(error.value)


def test_unusable_files_are_told_in_a_line(tmp_path):
    whole = write(tmp_path, features=FEATURES, labels=LABELS).read_bytes()
    for name, content in {
        "cut.mat": whole[: len(whole) // 2],
        "text.mat": b"no MATLAB file" * 20,
        "empty.mat": b"",
    }.items():
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(data.DataError, match="not a MATLAB file that can be read") as error:
            data.read_distributions(path)
        assert "\n" not in str(error.value)
    with pytest.raises(data.DataError, match="no such file"):
        data.read_distributions(tmp_path / "none.mat")
    with pytest.raises(data.DataError, match="no such folder"):
        data.read_distributions_folder(tmp_path / "none")
    (tmp_path / "bare").mkdir()
    with pytest.raises(data.DataError, match=r"holds no \.mat files"):
        data.read_distributions_folder(tmp_path / "bare")


def test_the_drawn_set_is_a_function_of_seed_and_index():
    long, short, other = (data.synthetic_distributions(*arguments) for arguments in ((3, 40), (3, 10), (4, 10)))
    assert torch.equal(long.labels[:10], short.labels) and torch.equal(long.features[:10], short.features)
    assert not torch.equal(short.labels, other.labels)
    torch.testing.assert_close(long.labels.sum(1), torch.ones(40))


@pytest.mark.skipif("FASTFOREST_DATA" not in os.environ, reason="FASTFOREST_DATA is not set")
def test_the_real_sets_are_distributions():
    sets = {found.name: found for found in data.read_distributions_folder(Path(os.environ["FASTFOREST_DATA"]) / "ldl")}
    assert sets["Movie"].features.shape == (7755, 1869) and sets["Movie"].labels.shape == (7755, 5)
    for found in sets.values():
        torch.testing.assert_close(found.labels.sum(1), torch.ones(len(found.labels)))
        assert found.labels.min() >= 0 and found.features.isfinite().all()


# measures


def test_the_six_measures_by_hand():
    pred = np.array([[0.2, 0.3, 0.5], [0.25, 0.5, 0.25]])
    target = np.array([[0.5, 0.5, 0.0], [0.25, 0.5, 0.25]])
    found = measures.distribution_measures(pred, target)
    wanted = {
        "kl": 0.5 * math.log(0.5 / 0.2) + 0.5 * math.log(0.5 / 0.3),
        "euclidean": math.sqrt(0.09 + 0.04 + 0.25),
        "sorensen": 1.0 / 2.0,
        "squared_chi2": 0.09 / 0.7 + 0.04 / 0.8 + 0.25 / 0.5,
        "fidelity": math.sqrt(0.1) + math.sqrt(0.15),
        "intersection": 0.2 + 0.3,
    }
    assert tuple(found) == measures.DISTRIBUTION_MEASURES
    for name, value in wanted.items():
        assert float(found[name][0]) == pytest.approx(value, abs=1e-12), name
        best = 0.0 if measures.SMALLER_IS_BETTER[name] else 1.0
        assert float(found[name][1]) == pytest.approx(best, abs=1e-12), name


def test_zeros_on_both_sides_and_on_one():
    found = measures.distribution_measures(torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0]]))
    assert [float(value) for value in found.values()] == [0.0, 0.0, 0.0, 0.0, 1.0, 1.0]
    missed = measures.distribution_measures(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]))
    assert float(missed["kl"]) == pytest.approx(-math.log(1e-12))
    assert float(missed["sorensen"]) == 1.0 and float(missed["fidelity"]) == 0.0


@pytest.mark.parametrize(
    "pred, target, complaint",
    [
        (torch.ones(2, 2) / 2, torch.ones(3, 2) / 2, "the same shape"),
        (torch.ones(2, 2), torch.ones(2, 2) / 2, "rows of pred must sum to 1"),
        (torch.tensor([[1.5, -0.5]]), torch.ones(1, 2) / 2, "pred must not be negative"),
        (torch.ones(0, 2), torch.ones(0, 2), "N, C > 0"),
    ],
)
def test_no_distributions_are_refused(pred, target, complaint):
    with pytest.raises(ValueError, match=complaint):
        measures.distribution_measures(pred, target)


def test_score_measures_by_hand():
    found = measures.score_measures(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([1.0, 3.0, 2.0]))
    assert found["mae"] == pytest.approx(1.0) and found["rmse"] == pytest.approx(math.sqrt(5 / 3))
    assert found["pearson"] == pytest.approx(np.corrcoef([1, 2, 4], [1, 3, 2])[0, 1])
    low, high, target = torch.tensor([0.0, 0.0, 0.0]), torch.tensor([1.0, 1.0, 1.0]), torch.tensor([1.0, 2.0, 0.5])
    assert measures.coverage(low, high, target) == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="expected two"):
        measures.score_measures(torch.zeros(2), torch.zeros(3))
    with pytest.raises(TypeError, match="floating-point"):
        measures.score_measures(torch.zeros(2, dtype=torch.int64), torch.zeros(2))


def test_calibration_recovers_k_and_b():
    x = torch.linspace(1, 5, 200)
    k, b = measures.calibrate_linear(x, 0.823 * x - 0.042)
    assert k == pytest.approx(0.823, abs=1e-6) and b == pytest.approx(-0.042, abs=1e-6)
    noisy = 0.823 * x - 0.042 + 0.1 * torch.randn(200, generator=torch.Generator().manual_seed(0))
    np.testing.assert_allclose(measures.calibrate_linear(x, noisy), np.polyfit(x, noisy, 1), atol=1e-6)
    with pytest.raises(ValueError, match="two different numbers"):
        measures.calibrate_linear(torch.ones(3), torch.ones(3))


# the recipe


def test_features_are_prepared_by_the_training_rows_alone():
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(200, 2, generator=generator) * 5 + 3
    common, rare = (torch.arange(200) % 4 == 0).float(), (torch.arange(200) < 3).float()
    rows = torch.stack([real[:, 0], common, torch.ones(200), rare, real[:, 1]], dim=1)
    plain = recipe.Preparation(rows)(rows)
    assert plain.shape == (200, 4)
    torch.testing.assert_close(plain[:, [0, 2, 3]].mean(0), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(plain[:, [0, 2, 3]].std(0, correction=0), torch.ones(3))
    ramps = recipe.Preparation(rows, ramps=4, binary_power=0.0, min_count=5)
    assert ramps(rows).shape == (200, 1 + 2 * 4)
    assert torch.equal(ramps(rows[:7]), ramps(rows)[:7])
    assert ramps(rows * 1e6).isfinite().all()


def test_folds_partition_the_rows():
    parts = recipe.folds(23, 5, seed=1)
    assert torch.cat([test for _, test in parts]).sort().values.tolist() == list(range(23))
    for train, test in parts:
        assert sorted(train.tolist() + test.tolist()) == list(range(23))
    assert [test.tolist() for _, test in parts] == [test.tolist() for _, test in recipe.folds(23, 5, seed=1)]
    with pytest.raises(ValueError, match="2 rows for each"):
        recipe.folds(9, 5, seed=0)


def test_softmax_regression_finds_its_own_weights():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(300, 3, generator=generator)
    labels = (features @ torch.randn(3, 4, generator=generator)).softmax(-1)
    found = measures.distribution_measures(recipe.softmax_regression(features, labels, 1e-9)(features), labels)
    assert float(found["kl"].max()) < 1e-5


def test_a_run_beats_the_mean_and_writes_what_it_promises(tmp_path, monkeypatch, capsys):
    own = data.synthetic_distributions
    monkeypatch.setattr(data, "synthetic_distributions", lambda seed: own(seed, 240, 6, 4))
    command = ["--data", "synthetic", "--folds", "2", "--epochs", "25", "--members", "1", "--out", str(tmp_path / "a")]
    assert recipe.main(command) == 0
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["results.json", "results.md"]
    summary = json.loads((tmp_path / "a" / "results.json").read_text())
    models = summary["sets"]["synthetic"]["models"]
    kl = {model: values["kl"]["mean"] for model, values in models.items()}
    assert kl["forest"] < 0.95 * kl["mean distribution"] and kl["softmax regression"] < kl["mean distribution"]
    folds = models["forest"]["kl"]["folds"]
    assert len(folds) == 2 and models["forest"]["kl"]["mean"] == pytest.approx(sum(folds) / 2)
    assert "| forest | " in (tmp_path / "a" / "results.md").read_text()
    assert "| mean distribution | " in capsys.readouterr().out


@pytest.mark.parametrize(
    "name, complaint", [("none.mat", "no such file"), ("none", "no such folder"), ("small.mat", "too few for 10 folds")]
)
def test_bad_input_is_one_line_and_nothing_written(tmp_path, capsys, name, complaint):
    write(tmp_path, "small.mat", features=FEATURES, labels=LABELS)
    assert recipe.main(["--data", str(tmp_path / name), "--out", str(tmp_path / "out")]) == 2
    captured = capsys.readouterr()
    assert complaint in captured.err and captured.err.count("\n") == 1 and not (tmp_path / "out").exists()
