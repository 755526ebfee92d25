"""The pool room: the contract on every backend, then the failures that practice showed."""

from __future__ import annotations

import math

import contract
import pytest
import torch
from contract import Case, Operator

import fastforest as ff
from fastforest.reference import pool as exact

OPERATORS = {
    "kl_loss": Operator(ff.pool_kl_loss, exact.pool_kl_loss, ("prob", "points", "weight")),
    "l2_loss": Operator(ff.pool_l2_loss, exact.pool_l2_loss, ("prob", "points", "weight"), fused=False),
    "kl_statistics": Operator(ff.pool_kl_statistics, exact.pool_kl_statistics, ("prob", "points", "weight")),
    "l2_statistics": Operator(
        ff.pool_l2_statistics, exact.pool_l2_statistics, ("prob", "points", "weight"), fused=False
    ),
    "expectation": Operator(ff.pool_expectation, exact.pool_expectation, ("prob",), fused=False),
    "peak": Operator(ff.pool_peak, exact.pool_peak, ("prob",)),
    "heatmap": Operator(ff.pool_heatmap, exact.pool_heatmap, ("prob",), fused=False),
}
SIZES = {
    "ones": (1, 1, 1, 1, 1, 1.0, 3.0),
    "odd": (3, 5, 33, 17, 19, 1.5, 3.0),
    "real": (2, 68, 128, 32, 32, 2.0, 3.0),
    "tiny": (2, 3, 4, 5, 6, 1.0, 2.0),
    "wide window": (2, 7, 67, 13, 9, 4.0, 2.0),
}


def case_of(operator: str, size: str) -> Case:
    batch, landmarks, leaves, height, width, sigma, truncate = SIZES[size]
    windowed = operator.endswith(("loss", "statistics"))

    def inputs(generator: torch.Generator) -> dict[str, torch.Tensor]:
        seed = int(torch.randint(1 << 30, (1,), generator=generator))
        prob, pool, points = leaves_and_rows(batch, landmarks, leaves, height, width, seed=seed)
        made = {"prob": prob} if operator == "l2_statistics" else {"prob": prob, "pool": pool}
        if windowed:
            weight = torch.rand(batch, landmarks, generator=generator, dtype=torch.float64)
            weight[-1, -1] = 0 if weight.numel() > 1 else 1
            made |= {"points": points, "weight": weight}
        return made

    options = {"sigma": sigma, "truncate": truncate} if windowed else {}
    if operator == "l2_statistics":
        options["size"] = (height, width)
    gradients = {"kl_loss", "l2_loss", "expectation", "heatmap"}
    return Case(size, inputs, options, ("prob", "pool") if operator in gradients else ())


every_operator = pytest.mark.parametrize("operator", OPERATORS)
differentiable = pytest.mark.parametrize("operator", ["kl_loss", "l2_loss", "expectation"])


@every_operator
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_contract_agreement(operator, size, dtype, backend):
    contract.check_agreement(OPERATORS[operator], case_of(operator, size), backend, dtype)


@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_contract_under_each_instruction_set(isa, rerun_under):
    rerun_under(isa, __file__, "(agreement or broken or equal_peaks or rows_apart) and not shim")


@differentiable
def test_contract_gradcheck(operator, backend):
    contract.check_gradcheck(OPERATORS[operator], case_of(operator, "tiny"), backend)


@every_operator
def test_contract_strides(operator, backend):
    contract.check_strides(OPERATORS[operator], case_of(operator, "odd"), backend)


@every_operator
def test_contract_vmap(operator, backend):
    contract.check_vmap(OPERATORS[operator], case_of(operator, "odd"), backend)


@every_operator
def test_contract_autocast(operator, backend):
    contract.check_autocast(OPERATORS[operator], case_of(operator, "odd"), backend, same=False)


@every_operator
def test_contract_repeatable(operator, backend):
    contract.check_repeatable(OPERATORS[operator], case_of(operator, "odd"), backend)


@pytest.mark.parametrize("operator", ["kl_loss", "l2_loss", "expectation", "peak"])
def test_contract_rows_apart(operator, backend):
    case = case_of(operator, "odd")
    contract.check_rows_apart(OPERATORS[operator], case, backend, "prob", [math.nan, math.inf, -math.inf])
    if "points" in case.inputs(torch.Generator()):
        contract.check_rows_apart(OPERATORS[operator], case, backend, "points", [math.nan, math.inf, 1e30])


@every_operator
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_contract_soiled_memory(operator, size, dtype, backend):
    contract.check_soiled_memory(OPERATORS[operator], case_of(operator, size), backend, dtype)


@pytest.mark.parametrize("operator", ["kl_loss", "l2_loss", "expectation", "peak", "heatmap"])
def test_contract_empty(operator, backend):
    contract.check_empty(OPERATORS[operator], case_of(operator, "odd"), backend)


@pytest.mark.parametrize("operator", ["kl_loss", "l2_loss", "kl_statistics"])
def test_contract_compile(operator):
    contract.check_compile(OPERATORS[operator], case_of(operator, "odd"))


def test_contract_opcheck(sample):
    prob, pool, points = sample
    weight = torch.rand(3, 5)
    window = (1.5, 5)
    ops = torch.ops.fastforest
    prob.requires_grad_()
    pool.requires_grad_()
    contract.check_opcheck(ops.pool_kl_loss, prob, pool, points, weight, *window, 1e-12, True)
    contract.check_opcheck(ops.pool_l2_target, pool, points, weight, *window)
    prob, pool = prob.detach(), pool.detach()
    contract.check_opcheck(ops.pool_kl_loss_backward_pool, prob, pool, points, weight, *window, 1e-12)
    contract.check_opcheck(ops.pool_kl_statistics, prob, pool, points, None, *window, 1e-12)
    contract.check_opcheck(ops.pool_kl_statistics_, prob, pool, points, None, *window, 1e-12, torch.zeros_like(pool))
    contract.check_opcheck(ops.pool_l2_cross, prob, points, weight, 17, 19, *window)
    contract.check_opcheck(ops.pool_peak, prob, pool, 1)


P, Q, X = torch.rand(2, 3, 4), torch.rand(5, 6, 4), torch.rand(2, 3, 2)
STRIDED = Q.transpose(0, 1).contiguous().transpose(0, 1)
ERRORS = [
    (lambda: ff.pool_kl_loss(1.0, Q, X, 1.0), TypeError, r"pool_kl_loss: prob must be a tensor \[B, P, N\], got float"),
    (lambda: ff.pool_kl_loss(P.long(), Q, X, 1.0), TypeError, "prob must be float32, float64, .* got int64"),
    (lambda: ff.pool_kl_loss(P[0], Q, X, 1.0), ValueError, r"prob must be \[B, P, N\], got \[3, 4\]"),
    (lambda: ff.pool_kl_loss(P, Q[..., :3], X, 1.0), ValueError, r"prob must be \[2, 3, 3\] .*got \[2, 3, 4\]"),
    (lambda: ff.pool_kl_loss(P, Q.double(), X, 1.0), ValueError, "pool's dtype must be torch.float32"),
    (lambda: ff.pool_kl_loss(P, Q[:0], X, 1.0), ValueError, r"pool must not be empty, got \[0, 6, 4\]"),
    (lambda: ff.pool_kl_loss(P, Q, X[:, :2], 1.0), ValueError, r"points must be \[2, 3, 2\] .*got \[2, 2, 2\]"),
    (lambda: ff.pool_kl_loss(P, Q, X, 0.0), ValueError, "sigma must be above 0, got 0"),
    (lambda: ff.pool_kl_loss(P, Q, X, 1e20), ValueError, "sigma must be within 1e-15 and 1e15, got 1e.20"),
    (lambda: ff.pool_kl_loss(P, Q, X, 1.0, weight=[1.0]), TypeError, "weight must be a tensor .*got list"),
    (lambda: ff.pool_kl_loss(P, Q, X, math.nan), ValueError, "sigma must be finite, got nan"),
    (lambda: ff.pool_kl_loss(P, Q, X, torch.ones(2, 3)), TypeError, "sigma must be a number, got Tensor"),
    (lambda: ff.pool_kl_loss(P, Q, X, 1.0, truncate=-1.0), ValueError, "truncate must be at least 0"),
    (lambda: ff.pool_kl_loss(P, Q, X, 1.0, eps=-1.0), ValueError, "eps must be at least 0"),
    (lambda: ff.pool_kl_loss(P, Q, X, 1.0, weight=torch.ones(3, 2)), ValueError, r"weight must be \[2, 3\]"),
    (lambda: ff.pool_kl_loss(P, Q, X.to("meta"), 1.0), ValueError, "points must be on cpu .* got meta"),
    (lambda: ff.pool_l2_loss(P, Q, X, 1.0, gram=torch.ones(3, 3)), ValueError, r"pool_l2_loss: gram must be \[4, 4\]"),
    (lambda: ff.pool_kl_statistics(P, Q, X, 1.0, out=Q[:4].clone()), ValueError, r"out must be \[5, 6, 4\]"),
    (
        lambda: ff.pool_kl_statistics(P, Q, X, 1.0, out=STRIDED),
        ValueError,
        "out must be contiguous",
    ),
    (lambda: ff.pool_kl_statistics(P, Q, X, 1.0, out=Q.double()), ValueError, "out's dtype must be torch.float32"),
    (lambda: ff.pool_l2_statistics(P, X, 1.0, 5), TypeError, r"pool_l2_statistics: size must be \(H, W\), got 5"),
    (lambda: ff.pool_l2_statistics(P, X, 1.0, (0, 5)), ValueError, "H of size must be at least 1, got 0"),
    (lambda: ff.pool_kl_update(Q, Q[:2]), ValueError, r"pool_kl_update: pool must be \[5, 6, 4\]"),
    (lambda: ff.pool_kl_update(Q, Q, min_mass=-1), ValueError, "min_mass must be at least 0"),
    (lambda: ff.pool_l2_update(torch.eye(3), Q), ValueError, r"gram must be \[4, 4\]"),
    (lambda: ff.pool_l2_update(torch.eye(4), Q, ridge=-1.0), ValueError, "ridge must be at least 0"),
    (lambda: ff.pool_peak(P, Q, "dark"), ValueError, "refine must be one of 'none', 'quarter_sign', .*got 'dark'"),
    (lambda: ff.pool_heatmap(P, Q[0]), ValueError, r"pool must be \[H, W, N\], got \[6, 4\]"),
]


@pytest.mark.parametrize(("call", "kind", "pattern"), ERRORS, ids=[pattern[:40] for _, _, pattern in ERRORS])
def test_contract_errors(call, kind, pattern):
    contract.check_error(call, kind, pattern)


def leaves_and_rows(batch, landmarks, leaves, height, width, dtype=torch.float64, seed=0):
    """prob [B, P, N], pool [H, W, N] and points [B, P, 2], some of them off the canvas."""
    generator = torch.Generator().manual_seed(seed)
    prob = torch.softmax(2 * torch.randn(batch, landmarks, leaves, generator=generator, dtype=torch.float64), -1)
    pool = torch.rand(height, width, leaves, generator=generator, dtype=torch.float64) + 0.05
    place = torch.rand(batch, landmarks, 2, generator=generator, dtype=torch.float64)
    points = place * torch.tensor([width + 6.0, height + 6.0]) - 3
    return prob.to(dtype), (pool / pool.sum((0, 1))).to(dtype), points.to(dtype)


@pytest.fixture
def sample():
    return leaves_and_rows(3, 5, 33, 17, 19, torch.float32)


def test_kl_equals_torch_kl_div_when_the_window_is_the_canvas():
    """Independent of our reference: torch's own KL of a dense, untruncated target."""
    prob, pool, points = leaves_and_rows(2, 4, 9, 12, 10)
    points = points.clamp(0, 9)
    y, x = torch.arange(12.0).double(), torch.arange(10.0).double()
    gx = torch.softmax(-((x - points[..., :1]) ** 2) / (2 * 1.5**2), -1)
    gy = torch.softmax(-((y - points[..., 1:]) ** 2) / (2 * 1.5**2), -1)
    target = gy.unsqueeze(-1) * gx.unsqueeze(-2)
    dense = torch.nn.functional.kl_div(ff.pool_heatmap(prob, pool).log(), target, reduction="none").sum((-2, -1))
    torch.testing.assert_close(ff.pool_kl_loss(prob, pool, points, 1.5, truncate=20.0), dense)


def test_l2_equals_the_dense_square():
    prob, pool, points = leaves_and_rows(2, 4, 9, 12, 10)
    points = points.clamp(0, 9)
    target, _ = exact.window_target(points, 1.5, 3.0, (12, 10))
    dense = (target - ff.pool_heatmap(prob, pool)).square().sum((-2, -1))
    torch.testing.assert_close(ff.pool_l2_loss(prob, pool, points, 1.5), dense)
    gram = pool.flatten(0, 1).T @ pool.flatten(0, 1)
    torch.testing.assert_close(ff.pool_l2_loss(prob, pool, points, 1.5, gram=gram), dense)


@pytest.mark.parametrize("place", [(-100.0, 3.0), (3.0, 1e9), (-4.0, 0.0), (1e30, -1e30)], ids=str)
def test_a_window_that_misses_the_canvas_counts_nothing(sample, place):
    prob, pool, points = sample
    points = points.clamp(2, 10)
    gone = points.clone()
    gone[1, 2] = torch.tensor(place)
    hidden = torch.ones(points.shape[:2])
    hidden[1, 2] = 0
    for loss in (ff.pool_kl_loss, ff.pool_l2_loss):
        row = loss(prob, pool, gone, 1.0)
        assert row[1, 2] == 0
        torch.testing.assert_close(row, loss(prob, pool, points, 1.0, weight=hidden))
    torch.testing.assert_close(
        ff.pool_kl_statistics(prob, pool, gone, 1.0), ff.pool_kl_statistics(prob, pool, points, 1.0, weight=hidden)
    )
    for a, b in zip(
        ff.pool_l2_statistics(prob, gone, 1.0, (17, 19)),
        ff.pool_l2_statistics(prob, points, 1.0, (17, 19), weight=hidden),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["prob", "points"])
def test_a_broken_row_breaks_itself_alone(sample, where, bad):
    prob, pool, points = (t.clone() for t in sample)
    points.clamp_(2, 10)
    clean_kl, clean_l2 = ff.pool_kl_loss(prob, pool, points, 1.0), ff.pool_l2_loss(prob, pool, points, 1.0)
    {"prob": prob, "points": points}[where][1, 2, 1] = bad
    prob.requires_grad_()
    others = torch.ones(3, 5, dtype=torch.bool)
    others[1, 2] = False
    for loss, clean in ((ff.pool_kl_loss, clean_kl), (ff.pool_l2_loss, clean_l2)):
        out = loss(prob, pool, points, 1.0)
        assert out[1, 2].isnan(), loss
        torch.testing.assert_close(out[others], clean[others])
        (grad,) = torch.autograd.grad(out.sum(), prob)
        assert grad[others].isfinite().all()
        assert not grad[1, 2].isfinite().all()
    weight = others.float()
    hidden = ff.pool_kl_loss(prob, pool, points, 1.0, weight=weight)
    assert hidden[1, 2] == 0 and hidden.isfinite().all()
    (grad,) = torch.autograd.grad(hidden.sum(), prob)
    assert grad.isfinite().all() and (grad[1, 2] == 0).all()
    stat = ff.pool_kl_statistics(prob, pool, points, 1.0)
    torch.testing.assert_close(stat, ff.pool_kl_statistics(prob, pool, points, 1.0, weight=weight))
    gram, cross = ff.pool_l2_statistics(prob, points, 1.0, (17, 19))
    expected = ff.pool_l2_statistics(prob, points, 1.0, (17, 19), weight=weight)
    torch.testing.assert_close((gram, cross), expected)


def test_a_broken_leaf_breaks_the_rows_that_reach_it(sample):
    prob, pool, points = (t.clone() for t in sample)
    points[:] = torch.tensor([3.0, 3.0])
    points[0, 0] = torch.tensor([15.0, 13.0])
    pool[3, 3, 4] = math.nan
    loss = ff.pool_kl_loss(prob, pool, points, 1.0)
    assert loss[0, 0].isfinite() and loss.isnan().sum() == 14


def test_eps_floors_the_mixture_and_stops_its_gradient():
    pool = torch.zeros(8, 8, 2)
    pool[0, 0, 0] = pool[7, 7, 1] = 1.0
    prob = torch.tensor([[[1.0, 0.0]]], requires_grad=True)
    points = torch.tensor([[[4.0, 4.0]]])
    loss = ff.pool_kl_loss(prob, pool, points, 0.5, eps=1e-6)
    target, _ = exact.window_target(points, 0.5, 3.0, (8, 8))
    torch.testing.assert_close(loss[0, 0], (torch.special.xlogy(target, target) - target * math.log(1e-6)).sum())
    assert (torch.autograd.grad(loss.sum(), prob)[0] == 0).all()
    assert (ff.pool_kl_statistics(prob, pool, points, 0.5, eps=1e-6) == 0).all()


def test_one_hot_and_uniform_selections_and_single_leaf():
    _, pool, points = leaves_and_rows(2, 3, 6, 9, 9)
    hot = torch.nn.functional.one_hot(torch.tensor([[0, 1, 2], [3, 4, 5]]), 6).double()
    for p in (hot, torch.full_like(hot, 1 / 6)):
        torch.testing.assert_close(ff.pool_kl_loss(p, pool, points, 1.0), exact.pool_kl_loss(p, pool, points, 1.0))
    one = pool[..., :1] / pool[..., :1].sum()
    ones = torch.ones(2, 3, 1, dtype=torch.float64)
    torch.testing.assert_close(ff.pool_kl_loss(ones, one, points, 1.0), exact.pool_kl_loss(ones, one, points, 1.0))
    mean, covariance = ff.pool_expectation(hot, pool)
    torch.testing.assert_close((mean, covariance), exact.pool_expectation(hot, pool))


def test_huge_and_equal_logits_train(sample):
    _, pool, points = sample
    for logits in (torch.full((3, 5, 33), 1e30), torch.zeros(3, 5, 33), torch.randn(3, 5, 33) * 1e4):
        logits.requires_grad_()
        loss = ff.pool_kl_loss(torch.softmax(logits, -1), pool, points, 1.0)
        loss.sum().backward()
        assert loss.isfinite().all() and logits.grad.isfinite().all()


def test_statistics_add_up_and_accumulate_in_place(sample):
    prob, pool, points = sample
    whole = ff.pool_kl_statistics(prob, pool, points, 1.5)
    parts = sum(ff.pool_kl_statistics(prob[i : i + 1], pool, points[i : i + 1], 1.5) for i in range(3))
    torch.testing.assert_close(whole, parts)
    out = torch.full_like(pool, 2.0)
    same = ff.pool_kl_statistics(prob, pool, points, 1.5, out=out)
    assert same is out
    torch.testing.assert_close(out - 2, whole, atol=1e-6, rtol=1e-5)
    far = torch.full_like(points, 3.0)
    touched = torch.full_like(pool, math.nan)  # pixels outside every window are not even read
    touched[:9, :9] = 0
    ff.pool_kl_statistics(prob, pool, far, 1.5, out=touched)
    assert touched[:9, :9].isfinite().all() and touched[9:].isnan().all() and touched[:, 9:].isnan().all()


def test_bounding_never_increases_the_loss():
    prob, pool, points = leaves_and_rows(8, 6, 20, 24, 24)
    points = points.clamp(3, 20)
    last = ff.pool_kl_loss(prob, pool, points, 1.5).sum()
    for _ in range(60):
        pool, dead = ff.pool_kl_update(ff.pool_kl_statistics(prob, pool, points, 1.5), pool)
        loss = ff.pool_kl_loss(prob, pool, points, 1.5).sum()
        assert dead == 0 and loss <= last + 1e-9 * abs(last)
        last = loss
    torch.testing.assert_close(pool.sum((0, 1)), torch.ones(20, dtype=torch.float64))


def test_dead_leaves_are_counted_and_reseeded():
    prob, pool, points = leaves_and_rows(4, 6, 10, 16, 16)
    points = points.clamp(3, 12)
    prob[..., [2, 7]] = 0
    prob /= prob.sum(-1, keepdim=True)
    stat = ff.pool_kl_statistics(prob, pool, points, 1.5)
    fresh, dead = ff.pool_kl_update(stat, pool)
    assert dead == 2 and fresh.isfinite().all()
    torch.testing.assert_close((fresh, dead), exact.pool_kl_update(stat, pool))
    heavy = stat.sum((0, 1)).argsort(descending=True)
    torch.testing.assert_close(fresh[..., 2], fresh[..., heavy[0]])
    torch.testing.assert_close(fresh[..., 7], fresh[..., heavy[1]])
    kept, all_dead = ff.pool_kl_update(torch.zeros_like(stat), pool)
    assert all_dead == 10
    torch.testing.assert_close(kept, pool)


def test_least_squares_solves_and_projects():
    prob, pool, points = leaves_and_rows(6, 10, 8, 12, 12)
    gram, cross = ff.pool_l2_statistics(prob, points, 1.5, (12, 12))
    loose, dead = ff.pool_l2_update(gram, cross, ridge=0.0, simplex=False)
    assert dead == 0
    target, inside = exact.window_target(points, 1.5, 3.0, (12, 12))
    seen = inside.flatten(-2).any(-1).flatten()
    design, value = prob.flatten(0, 1)[seen], target.flatten(0, 1)[seen].flatten(1)
    torch.testing.assert_close(loose.flatten(0, 1).T, torch.linalg.lstsq(design, value).solution)
    tight, _ = ff.pool_l2_update(gram, cross, ridge=1e-9)
    assert (tight >= 0).all()
    torch.testing.assert_close(tight.sum((0, 1)), torch.ones(8, dtype=torch.float64))
    before = ff.pool_l2_loss(prob, pool, points, 1.5).sum()
    assert ff.pool_l2_loss(prob, loose.contiguous(), points, 1.5).sum() < before


def test_a_singular_gram_gives_the_minimum_norm_leaves():
    prob, _, points = leaves_and_rows(6, 10, 8, 12, 12)
    prob[..., 5] = 0  # never selected
    prob[..., 6] = prob[..., 7]  # always alike
    gram, cross = ff.pool_l2_statistics(prob, points, 1.5, (12, 12))
    solution, dead = ff.pool_l2_update(gram, cross, ridge=0.0, simplex=False)
    assert dead == 1 and solution.isfinite().all()
    assert solution[..., 5].abs().max() < 1e-9
    torch.testing.assert_close(solution[..., 6], solution[..., 7])
    expected, _ = exact.pool_l2_update(gram, cross, ridge=0.0, simplex=False)
    torch.testing.assert_close(solution, expected, atol=1e-8, rtol=1e-6)


def test_the_expectation_is_the_dense_soft_argmax(sample):
    prob, pool, _ = sample
    heatmap = ff.pool_heatmap(prob, pool)
    mean, covariance = ff.pool_expectation(prob, pool)
    x, y = torch.arange(19.0), torch.arange(17.0)
    torch.testing.assert_close(mean[..., 0], heatmap.sum(-2) @ x)
    torch.testing.assert_close(mean[..., 1], heatmap.sum(-1) @ y)
    assert (torch.linalg.eigvalsh(covariance.double()) > 0).all()


@pytest.mark.parametrize("refine", ["none", "quarter_sign", "quarter_second"])
def test_the_peak_is_that_of_the_dense_heatmap(sample, refine):
    prob, pool, _ = sample
    points, score = ff.pool_peak(prob, pool, refine)
    dense, dense_score = ff.peak(ff.pool_heatmap(prob, pool), refine)
    torch.testing.assert_close(points, dense)
    torch.testing.assert_close(score, dense_score)


def test_equal_peaks_take_the_lowest_index():
    pool = torch.zeros(4, 5, 2)
    pool[1, 3, 0] = pool[2, 0, 0] = 0.5
    pool[3, 4, 1] = 1.0
    prob = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]])
    points, score = ff.pool_peak(prob, pool)
    assert points[0].tolist() == [[3, 1], [4, 3], [0, 0]] and score[0].tolist() == [0.5, 1.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_computed_in_float32(sample, dtype):
    prob, pool, points = (t.to(dtype) for t in sample)
    loss = ff.pool_kl_loss(prob.requires_grad_(), pool, points, 1.0)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, ff.pool_kl_loss(prob.float(), pool.float(), points.float(), 1.0))
    assert torch.autograd.grad(loss.sum(), prob)[0].dtype == dtype


def test_wide_windows_and_tiny_sigmas():
    prob, pool, points = leaves_and_rows(2, 3, 5, 9, 13)
    for sigma, truncate in ((50.0, 3.0), (0.01, 3.0), (1.0, 0.0), (1e-3, 1000.0)):
        torch.testing.assert_close(
            ff.pool_kl_loss(prob, pool, points, sigma, truncate=truncate),
            exact.pool_kl_loss(prob, pool, points, sigma, truncate=truncate),
        )


def test_no_images_no_landmarks():
    pool = torch.rand(6, 7, 4)
    for batch, landmarks in ((0, 3), (2, 0)):
        prob, points = torch.rand(batch, landmarks, 4, requires_grad=True), torch.rand(batch, landmarks, 2)
        loss = ff.pool_kl_loss(prob, pool, points, 1.0)
        assert loss.shape == (batch, landmarks)
        loss.sum().backward()
        assert ff.pool_l2_loss(prob, pool, points, 1.0).shape == (batch, landmarks)
        assert (ff.pool_kl_statistics(prob, pool, points, 1.0) == 0).all()
        gram, cross = ff.pool_l2_statistics(prob, points, 1.0, (6, 7))
        assert (gram == 0).all() and (cross == 0).all() and cross.shape == (6, 7, 4)
        assert ff.pool_expectation(prob, pool)[1].shape == (batch, landmarks, 2, 2)
        assert ff.pool_peak(prob, pool)[0].shape == (batch, landmarks, 2)
        assert ff.pool_heatmap(prob, pool).shape == (batch, landmarks, 6, 7)


def test_images_more_than_2_to_the_31_elements_apart():
    prob, pool, points = leaves_and_rows(2, 3, 4, 6, 7, torch.float32)
    far_prob, far_points = contract.far_view((2, 3, 4)), contract.far_view((2, 3, 2))
    far_prob.copy_(prob)
    far_points.copy_(points)
    torch.testing.assert_close(
        ff.pool_kl_loss(far_prob, pool, far_points, 1.0), ff.pool_kl_loss(prob, pool, points, 1.0), rtol=0, atol=0
    )
    torch.testing.assert_close(
        ff.pool_kl_statistics(far_prob, pool, far_points, 1.0), ff.pool_kl_statistics(prob, pool, points, 1.0)
    )


def test_the_gradient_is_refused_where_none_is_defined(sample):
    prob, pool, points = sample
    with pytest.raises(ValueError, match="pool_kl_loss: points must not require a gradient"):
        ff.pool_kl_loss(prob, pool, points.requires_grad_(), 1.0)
    points = points.detach()
    with pytest.raises(ValueError, match="weight must not require a gradient"):
        ff.pool_l2_loss(prob, pool, points, 1.0, weight=torch.ones(3, 5, requires_grad=True))
    prob.requires_grad_()
    for total in (torch.sum, lambda loss: loss.square().sum()):
        (grad,) = torch.autograd.grad(total(ff.pool_kl_loss(prob, pool, points, 1.0)), prob, create_graph=True)
        with pytest.raises(RuntimeError, match="pool_kl_loss cannot be differentiated twice"):
            torch.autograd.grad(grad.sum(), prob)


def test_a_broken_weight_breaks_its_row_alone(sample):
    prob, pool, points = sample
    points = points.clamp(2, 10)
    for bad in (math.nan, math.inf):
        weight = torch.ones(3, 5)
        weight[1, 2] = bad
        hidden = torch.ones(3, 5)
        hidden[1, 2] = 0
        for loss in (ff.pool_kl_loss, ff.pool_l2_loss):
            row = loss(prob, pool, points, 1.0, weight=weight)
            assert row.isnan().sum() == 1 and row[1, 2].isnan()
        torch.testing.assert_close(
            ff.pool_kl_statistics(prob, pool, points, 1.0, weight=weight),
            ff.pool_kl_statistics(prob, pool, points, 1.0, weight=hidden),
        )
        torch.testing.assert_close(
            ff.pool_l2_statistics(prob, points, 1.0, (17, 19), weight=weight),
            ff.pool_l2_statistics(prob, points, 1.0, (17, 19), weight=hidden),
        )


def test_an_infinite_selection_has_no_peak(sample):
    prob, pool, _ = (t.clone() for t in sample)
    prob[1, 2, 3], prob[0, 0, 0] = math.inf, -math.inf
    points, score = ff.pool_peak(prob, pool)
    assert score.isnan().sum() == 2 and points[1, 2].isnan().all() and points[0, 0].isnan().all()


def test_a_floor_of_0_divides_nothing_by_0():
    pool = torch.zeros(8, 8, 2)
    pool[0, 0, 0] = pool[7, 7, 1] = 1.0
    prob, points = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[4.0, 4.0]]])
    for eps in (0.0, 1e-50):
        assert ff.pool_kl_statistics(prob, pool, points, 0.5, eps=eps).isfinite().all()
        assert ff.pool_kl_loss(prob, pool, points, 0.5, eps=eps).isfinite().all()


def test_statistics_of_a_transposed_pool_compile(sample):
    prob, pool, points = sample
    strided = pool.transpose(0, 1).contiguous().transpose(0, 1)
    compiled = torch.compile(ff.pool_kl_statistics, fullgraph=True)
    torch.testing.assert_close(
        compiled(prob, strided, points, 1.0), ff.pool_kl_statistics(prob, pool, points, 1.0), rtol=0, atol=0
    )


def test_vmap_over_nothing(sample):
    prob, pool, points = sample
    none = torch.vmap(lambda p: ff.pool_kl_loss(p, pool, points, 1.0))(prob.new_empty(0, *prob.shape))
    assert none.shape == (0, 3, 5)
