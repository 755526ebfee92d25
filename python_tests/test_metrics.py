"""fastforest.metrics: values by hand, the AUC identity, degenerate images, every message."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from fastforest.metrics import Metrics, auc, auc_from_ced, ced, evaluate, failure_rate, nme, normalizer_distance

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
    ],
)
def test_errors_name_function_argument_expected_and_got(
    call: Callable[[], object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        call()
