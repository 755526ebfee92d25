"""fastforest.metrics: values by hand, the AUC identity, degenerate images, every message."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from fastforest.data import REGIONS_68
from fastforest.metrics import (
    Metrics,
    auc,
    auc_from_ced,
    aurc,
    ced,
    evaluate,
    failure_auroc,
    failure_rate,
    landmark_errors,
    nme,
    normalizer_distance,
    region_nme,
    risk_coverage,
)

NAN = float("nan")


def faces(count: int = 5, points: int = 68, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, points, 2, generator=torch.Generator().manual_seed(seed)) * 100


def test_inter_ocular_uses_the_outer_corners_of_each_layout() -> None:
    for count, right, left in ((68, 36, 45), (98, 60, 72), (29, 8, 9)):
        points = torch.zeros(2, count, 2)
        points[:, left] = torch.tensor([30.0, 40.0])
        points[1, right] = torch.tensor([30.0, 0.0])
        assert normalizer_distance(points, "inter_ocular").tolist() == [50.0, 40.0]


def test_inter_pupil_uses_the_means_of_the_eyes() -> None:
    points = faces()
    expected = [math.dist(face[36:42].mean(0).tolist(), face[42:48].mean(0).tolist()) for face in points]
    assert normalizer_distance(points, "inter_pupil").tolist() == pytest.approx(expected, rel=1e-6)


def test_box_is_the_geometric_mean_of_the_sides() -> None:
    points = torch.tensor([[[1.0, 2.0], [5.0, 2.0], [3.0, 11.0]]])
    assert normalizer_distance(points, "box").tolist() == [6.0]


@pytest.mark.parametrize("normalizer", ["inter_ocular", "inter_pupil", "box", "given", 40.0])
def test_nme_against_a_loop(normalizer: str | float) -> None:
    target, pred = faces(), faces(seed=1)
    given = torch.linspace(10, 50, 5) if normalizer == "given" else normalizer
    if isinstance(given, torch.Tensor):
        distances = given.tolist()
    else:
        distances = normalizer_distance(target, given).tolist() if isinstance(given, str) else [given] * 5
    expected = []
    for p, g, d in zip(pred.tolist(), target.tolist(), distances, strict=True):
        expected.append(sum(math.dist(a, b) for a, b in zip(p, g, strict=True)) / len(p) / d)
    result = nme(pred, target, given)
    assert result.dtype == torch.float64 and result.shape == (5,)
    assert result.tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_nme_compares_in_float64(dtype: torch.dtype) -> None:
    target, pred = faces().to(dtype), faces(seed=1).to(dtype)
    exact = nme(pred.double(), target.double(), "box")
    assert torch.equal(nme(pred, target, "box"), exact)


def test_numpy_and_torch_agree() -> None:
    target, pred = faces(), faces(seed=1)
    assert torch.equal(nme(pred.numpy(), target.numpy(), "inter_ocular"), nme(pred, target, "inter_ocular"))
    errors = np.array([0.01, 0.2])
    assert failure_rate(errors, 0.1) == 0.5
    assert auc(errors, 0.1) == auc(torch.from_numpy(errors), 0.1)


def test_nme_does_not_change_with_scale_and_position() -> None:
    target, pred = faces().double(), faces(seed=1).double()
    for kind in ("inter_ocular", "inter_pupil", "box"):
        moved = nme(pred * 3.5 + 11, target * 3.5 + 11, kind)
        assert torch.allclose(moved, nme(pred, target, kind), rtol=1e-12)


def test_degenerate_images_are_nan_and_never_disturb_others() -> None:
    target, pred = faces(6), faces(6, seed=1)
    clean = nme(pred, target, "inter_ocular")
    target[1, 45] = target[1, 36]
    pred[2, 7, 0] = NAN
    pred[3, 7, 1] = math.inf
    target[4, 36] = NAN
    result = nme(pred, target, "inter_ocular")
    assert result.isnan().tolist() == [False, True, True, True, True, False]
    assert torch.equal(result[[0, 5]], clean[[0, 5]])
    given = nme(faces(4), faces(4, seed=1), torch.tensor([0.0, -1.0, math.inf, 2.0]))
    assert given.isnan().tolist() == [True, True, True, False]


def test_zero_error_over_zero_distance_is_nan() -> None:
    points = torch.zeros(1, 68, 2)
    assert nme(points, points, "box").isnan().all()


def test_failure_rate_is_strictly_above() -> None:
    assert failure_rate(torch.tensor([0.08, 0.0800001, 0.01, 0.5], dtype=torch.float64), 0.08) == 0.5


@pytest.mark.parametrize("a", [0.05, 0.08, 0.1, 1.0])
@pytest.mark.parametrize("count", [1, 2, 17, 1000])
def test_auc_is_exactly_the_integral_of_the_ced(count: int, a: float) -> None:
    generator = torch.Generator().manual_seed(count)
    errors = torch.rand(count, generator=generator, dtype=torch.float64) * 0.15
    errors[::7] = NAN
    errors[1::5] = a
    assert auc(errors, a) == pytest.approx(auc_from_ced(errors, a), abs=1e-12)


def test_auc_is_the_limit_of_a_trapezoid_over_the_curve() -> None:
    errors = torch.rand(300, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * 0.12
    thresholds, fractions = ced(errors, 0.08, points=200_001)
    assert float(torch.trapezoid(fractions, thresholds)) / 0.08 == pytest.approx(auc(errors, 0.08), abs=1e-4)


def test_auc_extremes() -> None:
    assert auc(torch.zeros(3), 0.08) == 1 == auc_from_ced(torch.zeros(3), 0.08)
    assert auc(torch.full((3,), 9.0), 0.08) == 0 == auc_from_ced(torch.full((3,), 9.0), 0.08)
    assert auc(torch.tensor([NAN, math.inf]), 0.08) == 0 == auc_from_ced(torch.tensor([NAN, math.inf]), 0.08)


def test_nan_counts_as_a_failure_everywhere() -> None:
    errors = torch.tensor([0.0, NAN], dtype=torch.float64)
    assert failure_rate(errors, 0.08) == 0.5
    assert auc(errors, 0.08) == 0.5
    assert float(ced(errors, 0.08)[1][-1]) == 0.5


def test_ced_counts_by_hand() -> None:
    errors = torch.tensor([0.02, 0.04, 0.04, 0.9, NAN], dtype=torch.float64)
    thresholds, fractions = ced(errors, 0.08, points=5)
    assert thresholds.tolist() == pytest.approx([0, 0.02, 0.04, 0.06, 0.08])
    assert fractions.tolist() == pytest.approx([0, 0.2, 0.6, 0.6, 0.6])
    assert (fractions.diff() >= 0).all()


def test_ced_ends_at_one_minus_the_failure_rate() -> None:
    errors = torch.rand(101, generator=torch.Generator().manual_seed(9)) * 0.2
    for a in (0.05, 0.1):
        assert float(ced(errors, a)[1][-1]) == pytest.approx(1 - failure_rate(errors, a), abs=1e-12)


def test_evaluate_collects_and_names() -> None:
    target, pred = faces(20), faces(20) + 0.5
    pred[4] = NAN
    result = evaluate(pred, target, "inter_ocular")
    errors = nme(pred, target, "inter_ocular")
    assert result.nme == pytest.approx(float(errors[~errors.isnan()].mean()))
    assert result.failure_rate == failure_rate(errors, 0.08) and result.auc == auc(errors, 0.08)
    assert (result.images, result.invalid, result.threshold) == (20, 1, 0.08)
    assert list(result.as_dict()) == [
        "NME[inter_ocular]",
        "FR@0.08[inter_ocular]",
        "AUC@0.08[inter_ocular]",
        "images",
        "invalid",
        "unknown",
    ]
    assert str(result).startswith(f"NME[inter_ocular] {100 * result.nme:.2f} %  FR@0.08[inter_ocular] ")
    assert "1 without an NME" in str(result)


def test_printed_names_follow_normaliser_and_threshold() -> None:
    assert str(Metrics(0.0531, 0.1, 0.4, "box", 0.1, 1, 0)) == (
        "NME[box] 5.31 %  FR@0.1[box] 10.00 %  AUC@0.1[box] 40.00 %  (1 image)"
    )
    assert evaluate(faces(2), faces(2), torch.ones(2), 0.05).normalizer == "given"


def test_evaluate_where_nothing_is_valid() -> None:
    target = torch.zeros(3, 68, 2)
    result = evaluate(target, target, "inter_ocular")
    assert math.isnan(result.nme) and result.failure_rate == 1 and result.auc == 0 and result.invalid == 3


def with_unknown() -> tuple[torch.Tensor, torch.Tensor]:
    """Predictions and truths of 5 faces, about a fifth of the truths unknown, no eye's; face 3 has none."""
    target, pred = faces().double(), faces(seed=1).double()
    hidden = torch.rand(5, 68, generator=torch.Generator().manual_seed(2)) < 0.2
    hidden[:, 36:48] = False
    hidden[3] = True
    target[hidden] = NAN
    return pred, target


@pytest.mark.parametrize("normalizer", ["inter_ocular", "inter_pupil", "box", 40.0])
def test_nme_is_the_mean_over_known_landmarks(normalizer: str | float) -> None:
    pred, target = with_unknown()
    result = nme(pred, target, normalizer)
    for index in (0, 1, 2, 4):
        known = target[index].isfinite().all(dim=-1)
        assert 0 < known.sum() < 68
        d = normalizer_distance(target[index : index + 1], normalizer) if isinstance(normalizer, str) else normalizer
        distances = (pred[index] - target[index])[known].norm(dim=-1)
        assert float(result[index]) == pytest.approx(float(distances.mean() / d), rel=1e-12)
    assert result[3].isnan()


def test_box_is_that_of_the_known_landmarks() -> None:
    points = torch.tensor([[[1.0, 2.0], [5.0, NAN], [3.0, 11.0], [2.0, 6.5]]])
    assert normalizer_distance(points, "box").tolist() == pytest.approx([math.sqrt(2 * 9)])
    assert normalizer_distance(torch.full((1, 4, 2), NAN), "box").isnan().all()


def test_an_unknown_prediction_of_a_known_landmark_is_a_failure_and_of_an_unknown_one_is_not() -> None:
    pred, target = with_unknown()
    clean = nme(pred, target, "inter_ocular")
    pred[target.isnan()] = NAN
    assert torch.equal(nme(pred, target, "inter_ocular")[[0, 1, 2, 4]], clean[[0, 1, 2, 4]])
    known = int(target[1].isfinite().all(dim=-1).nonzero()[0])
    pred[1, known] = NAN
    assert nme(pred, target, "inter_ocular").isnan().tolist() == [False, True, False, True, False]


def test_landmark_errors_average_to_the_nme() -> None:
    pred, target = with_unknown()
    errors = landmark_errors(pred, target, "inter_ocular")
    assert torch.equal(errors.isnan(), target.isnan().any(dim=-1))
    assert torch.equal(errors.nanmean(dim=1)[[0, 1, 2, 4]], nme(pred, target, "inter_ocular")[[0, 1, 2, 4]])
    pred[0, 40] = math.inf
    assert landmark_errors(pred, target, "inter_ocular")[0, 40] == math.inf


def test_regions_average_to_the_nme_by_their_known_landmarks() -> None:
    pred, target = with_unknown()
    regions = region_nme(pred, target, "inter_ocular", REGIONS_68)
    assert list(regions) == ["jaw", "brows", "nose", "eyes", "mouth"]
    known = target.isfinite().all(dim=-1)
    weights = torch.stack([known[:, list(indices)].sum(dim=1) for indices in REGIONS_68.values()])
    total = (torch.stack(list(regions.values())) * weights).sum(dim=0) / weights.sum(dim=0)
    keep = [0, 1, 2, 4]
    assert total[keep].tolist() == pytest.approx(nme(pred, target, "inter_ocular")[keep].tolist(), rel=1e-12)
    assert all(values[3].isnan() for values in regions.values())
    target[0, :17] = NAN
    chin = region_nme(pred, target, "inter_ocular", {"chin": [7, 8, 9]})["chin"]
    assert chin.isnan().tolist() == [True, False, False, True, False]


def test_evaluate_says_how_many_landmarks_are_unknown() -> None:
    pred, target = with_unknown()
    result = evaluate(pred, target, "inter_ocular")
    assert result.unknown == int(target.isnan().any(dim=-1).sum()) > 68 and result.invalid == 1
    assert str(result).endswith(f"not in the mean, {result.unknown} unknown landmarks left out)")


def brute_force(error: list[float], uncertainty: list[float]) -> list[float]:
    """Mean risk at each coverage over every order of the images that keeps the uncertainties sorted."""
    curves = []
    for order in itertools.permutations(range(len(error))):
        doubts = [uncertainty[i] for i in order]
        if doubts == sorted(doubts):
            sums = itertools.accumulate(error[i] for i in order)
            curves.append([total / (k + 1) for k, total in enumerate(sums)])
    return np.mean(curves, axis=0).tolist()


@pytest.mark.parametrize("seed", range(4))
def test_risk_coverage_is_the_mean_over_all_orders_of_ties(seed: int) -> None:
    rng = np.random.default_rng(seed)
    error, uncertainty = rng.uniform(0, 1, 7), rng.integers(0, 4, 7).astype(float)
    coverage, risk = risk_coverage(error, uncertainty)
    assert coverage.tolist() == pytest.approx([k / 7 for k in range(1, 8)])
    assert risk.tolist() == pytest.approx(brute_force(error.tolist(), uncertainty.tolist()), rel=1e-12)
    assert aurc(error, uncertainty) == pytest.approx(float(risk.mean()), rel=1e-12)
    shuffled = rng.permutation(7)
    assert aurc(error[shuffled], uncertainty[shuffled]) == pytest.approx(aurc(error, uncertainty), rel=1e-12)


def test_aurc_of_the_oracle_is_least_and_of_a_constant_the_mean() -> None:
    rng = np.random.default_rng(5)
    error = rng.uniform(0, 1, 200)
    best, worst = aurc(error, error), aurc(error, -error)
    assert all(best < aurc(error, rng.uniform(0, 1, 200)) < worst for _ in range(20))
    assert aurc(error, np.zeros(200)) == pytest.approx(error.mean(), rel=1e-12)
    assert aurc(error, np.exp(error)) == best


def test_an_unknown_uncertainty_is_the_greatest() -> None:
    error = torch.tensor([5.0, 1.0, 2.0, 3.0], dtype=torch.float64)
    risk = risk_coverage(error, torch.tensor([NAN, 7.0, 8.0, math.inf]))[1]
    assert risk.tolist() == pytest.approx([1, 1.5, (1 + 2 + 4) / 3, 11 / 4])  # NaN and inf are a tie
    assert risk_coverage(torch.tensor([0.5]), torch.tensor([NAN]))[1].tolist() == [0.5]


@pytest.mark.parametrize("levels", [12, 1000])
def test_failure_auroc_against_scikit_learn(levels: int) -> None:
    rng = np.random.default_rng(levels)
    error = rng.uniform(0, 0.16, 300)
    doubt = np.round((error + rng.normal(0, 0.05, 300)) * levels) / levels
    expected = roc_auc_score(error > 0.08, doubt)
    assert 0.6 < expected < 0.95
    assert failure_auroc(error, doubt, 0.08) == pytest.approx(expected, rel=1e-12)
    error[:3], doubt[3:6] = NAN, NAN
    failed = ~(error <= 0.08)
    expected = roc_auc_score(failed, np.where(np.isnan(doubt), 1e9, doubt))
    assert failure_auroc(error, doubt, 0.08) == pytest.approx(expected, rel=1e-12)


def test_failure_auroc_needs_failures_and_successes() -> None:
    doubt = torch.tensor([0.1, 0.2])
    assert math.isnan(failure_auroc(torch.tensor([0.01, 0.02]), doubt, 0.08))
    assert math.isnan(failure_auroc(torch.tensor([0.1, NAN]), doubt, 0.08))
    assert failure_auroc(torch.tensor([0.01, NAN]), doubt, 0.08) == 1


EMPTY = torch.zeros(0, 68, 2)
NESTED: Any = [[1.0]]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: nme(EMPTY, EMPTY, "box"), ValueError, "nme: pred must hold at least one image, got an empty batch"),
        (lambda: nme(EMPTY, EMPTY, torch.zeros(0)), ValueError, "nme: pred must hold at least one image"),
        (lambda: evaluate(EMPTY, EMPTY, "box"), ValueError, "empty batch"),
        (lambda: nme(faces()[0], faces()[0], "box"), ValueError, r"nme: pred must be \[B, P, 2\].*got \[68, 2\]"),
        (lambda: nme(faces(), faces(4), "box"), ValueError, r"same shape, got \[5, 68, 2\] and \[4, 68, 2\]"),
        (lambda: nme(faces().long(), faces(), "box"), TypeError, "nme: pred must be floating-point, got torch.int64"),
        (lambda: nme(NESTED, faces(), "box"), TypeError, "nme: pred must be a tensor or a numpy array, got list"),
        (lambda: nme(faces(), faces(), torch.ones(3)), ValueError, r"nme: normalizer must be \[5\].*got \[3\]"),
        (lambda: nme(faces(), faces(), "iod"), ValueError, "kind must be one of inter_ocular, inter_pupil, box, got"),
        (lambda: normalizer_distance(faces(points=5), "inter_ocular"), ValueError, "68, 98 or 29 points.*got 5"),
        (lambda: normalizer_distance(faces(points=98), "inter_pupil"), ValueError, "68 points.*got 98"),
        (lambda: normalizer_distance(torch.zeros(2, 0, 2), "box"), ValueError, r"points68 must be \[B, P, 2\] with P"),
        (lambda: failure_rate(torch.zeros(0), 0.08), ValueError, r"failure_rate: nme must be \[B\] with B > 0, got"),
        (lambda: auc(torch.zeros(2, 2), 0.08), ValueError, r"auc: nme must be \[B\].*got \[2, 2\]"),
        (lambda: auc(torch.zeros(2), 0.0), ValueError, "auc: a must be a positive finite number, got 0.0"),
        (lambda: auc(torch.zeros(2), NAN), ValueError, "auc: a must be a positive finite number, got nan"),
        (lambda: auc(torch.tensor([-0.5]), 0.1), ValueError, "auc: nme must be non-negative, got -0.5"),
        (lambda: ced(torch.zeros(2), 0.1, points=1), ValueError, "ced: points must be at least 2, got 1"),
        (
            lambda: landmark_errors(EMPTY, EMPTY, "box"),
            ValueError,
            "landmark_errors: pred must hold at least one image",
        ),
        (lambda: landmark_errors(faces(), faces(), torch.ones(3)), ValueError, r"landmark_errors: normalizer must be"),
        (
            lambda: region_nme(faces(), faces(), "box", {"ear": [67, 68]}),
            ValueError,
            r"region_nme: regions\['ear'\] must hold indices in 0..67, got \[67, 68\]",
        ),
        (lambda: region_nme(faces(), faces(), "box", {"ear": []}), ValueError, r"must hold indices in 0..67, got \[\]"),
        (lambda: risk_coverage(torch.zeros(0), torch.zeros(0)), ValueError, r"error must be \[B\] with B > 0, got \[0"),
        (lambda: risk_coverage(torch.zeros(2), torch.zeros(2, 1)), ValueError, r"uncertainty must be \[B\] with B > 0"),
        (lambda: risk_coverage(torch.zeros(2), torch.zeros(3)), ValueError, "must have the same length, got 2 and 3"),
        (lambda: aurc(torch.tensor([NAN]), torch.zeros(1)), ValueError, "risk_coverage: error must be finite, leave"),
        (lambda: aurc(NESTED, torch.zeros(1)), TypeError, "risk_coverage: error must be a tensor or a numpy array"),
        (lambda: failure_auroc(torch.zeros(2), torch.zeros(2), 0.0), ValueError, "failure_auroc: a must be a positive"),
        (
            lambda: failure_auroc(-torch.ones(2), torch.zeros(2), 0.1),
            ValueError,
            "error must be non-negative, got -1.0",
        ),
    ],
)
def test_errors_name_function_argument_expected_and_got(
    call: Callable[[], object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        call()
