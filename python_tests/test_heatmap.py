"""Room `heatmap`: the contract, and what its formulas promise."""

from __future__ import annotations

import doctest
import math

import contract
import pytest
import torch
from contract import Case, Operator
from torch import Tensor

from fastforest.ops import heatmap as ops
from fastforest.ops._register import op
from fastforest.reference import heatmap as reference

# A gradient of exactly 0 (a map of one pixel, a window of radius 0) is held against the size that gradients have.
RENDER = Operator(
    ops.render_gaussian, reference.render_gaussian, ("points", "sigma"), scale={"points": 1e-3, "sigma": 1e-3}
)
SOFT_ARGMAX = Operator(ops.soft_argmax, reference.soft_argmax, ("heatmap",), scale={"heatmap": 1e-1, "beta": 1e1})
PEAK = Operator(ops.peak, reference.peak, ("heatmap",))


def maps(*shape: int):
    return lambda g: {"heatmap": torch.rand(shape, generator=g, dtype=torch.float64)}


def maps_and_beta(*shape: int, beta: float):
    return lambda g: maps(*shape)(g) | {"beta": torch.tensor(beta, dtype=torch.float64)}


def points(images: int, landmarks: int, height: int, width: int, sigma: bool = False):
    def make(g: torch.Generator) -> dict[str, Tensor]:
        """Up to a fifth of the canvas outside it."""
        at = torch.rand(images, landmarks, 2, generator=g, dtype=torch.float64) * 1.4 - 0.2
        made = {"points": at * torch.tensor([width, height])}
        if sigma:
            made["sigma"] = 0.7 + torch.rand(images, landmarks, generator=g, dtype=torch.float64)
        return made

    return make


ALL_POINTS = ("points",)
RENDER_CASES = [
    Case("one-pixel", points(1, 1, 1, 1), {"sigma": 1.5, "size": (1, 1)}, ALL_POINTS),
    Case("aligned", points(2, 3, 16, 32), {"sigma": 2.0, "size": (16, 32)}, ALL_POINTS),
    Case("sigma", points(2, 3, 7, 13, True), {"size": (7, 13)}, ("points", "sigma")),
    Case("sum", points(2, 3, 7, 13, True), {"size": (7, 13), "normalize": "sum"}, ("points", "sigma")),
    Case("cut", points(2, 3, 17, 19, True), {"size": (17, 19), "truncate": 2.5}, ("points", "sigma")),
    Case(
        "cut-sum",
        points(3, 5, 17, 19, True),
        {"size": (17, 19), "truncate": 1, "normalize": "sum"},
        ("points", "sigma"),
    ),
]
SOFT_ARGMAX_CASES = [
    Case("one-pixel", maps(1, 1, 1, 1), {"beta": 10.0}, ("heatmap",)),
    Case("aligned", maps(2, 3, 16, 32), {"beta": 10.0}, ("heatmap",)),
    Case("large", maps(1, 1, 40, 26), {"beta": 10.0}, ("heatmap",)),
    Case("beta", maps_and_beta(2, 3, 7, 13, beta=10.0), {}, ("heatmap", "beta")),
    Case("negative-beta", maps_and_beta(2, 3, 7, 13, beta=-4.0), {}, ("heatmap", "beta")),
    Case("debias", maps_and_beta(2, 3, 7, 13, beta=5.0), {"debias": True}, ("heatmap", "beta")),
    Case("window", maps_and_beta(2, 3, 17, 19, beta=10.0), {"window": 2}, ("heatmap", "beta")),
    Case("window-0", maps(2, 3, 5, 7), {"window": 0}, ("heatmap",)),
    Case("window-debias", maps_and_beta(2, 3, 17, 19, beta=10.0), {"window": 3, "debias": True}, ("heatmap", "beta")),
]
PEAK_CASES = [
    Case(f"{refine}-{h}x{w}", maps(2, 5, h, w), {"refine": refine})
    for refine in ops.REFINEMENTS
    for h, w in ((1, 1), (7, 13), (40, 26))
]
EVERY = (
    [(RENDER, c) for c in RENDER_CASES]
    + [(SOFT_ARGMAX, c) for c in SOFT_ARGMAX_CASES]
    + [(PEAK, c) for c in PEAK_CASES]
)


def name(value: object) -> str:
    return (
        value.id if isinstance(value, Case) else value.function.__name__ if isinstance(value, Operator) else str(value)
    )


every = pytest.mark.parametrize("operator, case", EVERY, ids=name)
differentiable = pytest.mark.parametrize("operator, case", [(o, c) for o, c in EVERY if c.differentiable], ids=name)
chosen = pytest.mark.parametrize(
    "operator, case", [(RENDER, RENDER_CASES[5]), (SOFT_ARGMAX, SOFT_ARGMAX_CASES[5]),
                       (SOFT_ARGMAX, SOFT_ARGMAX_CASES[6]), (PEAK, PEAK_CASES[7])], ids=name)  # fmt: skip


@pytest.mark.parametrize("dtype", contract.DTYPES, ids=lambda d: str(d)[6:])
@every
def test_contract_agreement(operator: Operator, case: Case, backend: str, dtype: torch.dtype) -> None:
    contract.check_agreement(operator, case, backend, dtype)


@differentiable
def test_contract_gradcheck(operator: Operator, case: Case, backend: str) -> None:
    contract.check_gradcheck(operator, case, backend)


@every
def test_contract_strides(operator: Operator, case: Case, backend: str) -> None:
    contract.check_strides(operator, case, backend)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=lambda d: str(d)[6:])
@chosen
def test_contract_strides_low(operator: Operator, case: Case, backend: str, dtype: torch.dtype) -> None:
    contract.check_strides(operator, case, backend, dtype)


@chosen
def test_contract_repeatable(operator: Operator, case: Case, backend: str) -> None:
    contract.check_repeatable(operator, case, backend)


@chosen
def test_contract_empty(operator: Operator, case: Case, backend: str) -> None:
    contract.check_empty(operator, case, backend)


@chosen
def test_contract_rows_apart(operator: Operator, case: Case, backend: str) -> None:
    bad = "points" if operator is RENDER else "heatmap"
    contract.check_rows_apart(operator, case, backend, bad, (math.nan, math.inf, -math.inf))


@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_instruction_sets(rerun_under, isa: str) -> None:
    rerun_under(isa, __file__, "test_contract and cpu or values")


@chosen
def test_compile(operator: Operator, case: Case) -> None:
    contract.check_compile(operator, case)


@chosen
def test_vmap(operator: Operator, case: Case, backend: str) -> None:
    contract.check_vmap(operator, case, backend)


@chosen
def test_autocast(operator: Operator, case: Case, backend: str) -> None:
    contract.check_autocast(operator, case, backend, same=True)


def test_opcheck(backend: str) -> None:
    with contract.on(backend) as device:
        at = torch.rand(2, 3, 2, device=device, requires_grad=True)
        sigma = torch.rand(2, 3, device=device).add(0.5).requires_grad_()
        z = torch.rand(2, 3, 5, 7, device=device, requires_grad=True)
        beta = torch.tensor(3.0, device=device, requires_grad=True)
        # The shim wears the CPU's key: its gradient operators are reached through the forward ones.
        contract.check_opcheck(op("heatmap_render").default, at, sigma, 1.0, 5, 7, True, 2.0)
        contract.check_opcheck(op("heatmap_soft_argmax").default, z, beta, 1.0, -1, True)
        contract.check_opcheck(op("heatmap_soft_argmax").default, z, None, 2.0, 1, False)
        contract.check_opcheck(op("heatmap_peak").default, z.detach(), 1)


# ---- values ----------------------------------------------------------------------------------------------------


def test_values_render(backend: str) -> None:
    with contract.on(backend) as device:
        at = torch.tensor([[[3.0, 2.0], [2.5, 1.5], [-40.0, 1.0], [900.0, 1.0], [math.nan, 1.0]]], device=device)
        whole = ops.render_gaussian(at, 1.0, (5, 7), normalize="sum")[0]
        torch.testing.assert_close(whole[:4].sum((-2, -1)), torch.ones(4, device=device))
        assert whole[2, :, 0].sum() > 0.999  # all its mass on the nearest column
        assert whole[4].isnan().all()
        cut = ops.render_gaussian(at, 1.0, (5, 7), normalize="sum", truncate=1.0)[0]
        assert cut[2].eq(0).all() and cut[3].eq(0).all()
        # round half to even: 2.5 -> 2, 1.5 -> 2
        assert cut[1].nonzero().amin(0).tolist() == [1, 1] and cut[1].nonzero().amax(0).tolist() == [3, 3]
        assert ops.render_gaussian(at, 1.0, (5, 7))[0, 0].amax() == 1
        bad = ops.render_gaussian(at[:, :3], torch.tensor([[1.0, 0.0, math.inf]], device=device), (5, 7))[0]
        assert bad[0].isfinite().all() and bad[1:].isnan().all()


def test_values_soft_argmax(backend: str) -> None:
    with contract.on(backend) as device:
        z = torch.zeros(1, 6, 5, 8, device=device)
        z[0, 1] = 7e4  # huge and all equal
        z[0, 2, 3, 6] = 1e5
        z[0, 3] = -math.inf
        z[0, 4] = -math.inf
        z[0, 4, 1, 2] = 1.0
        z[0, 5, 0, 0] = math.inf
        for layout in (z, z.contiguous(memory_format=torch.channels_last)):
            got = ops.soft_argmax(layout.requires_grad_(), 10.0)
            torch.testing.assert_close(got[0, :2], torch.tensor([[3.5, 2.0]] * 2, device=device))
            torch.testing.assert_close(got[0, 2], torch.tensor([6.0, 3.0], device=device))
            torch.testing.assert_close(got[0, 4], torch.tensor([2.0, 1.0], device=device))
            assert got[0, 3].isnan().all() and got[0, 5].isnan().all()
            (grad,) = torch.autograd.grad(got[0, [0, 1, 2, 4]].sum(), layout)
            assert grad[0, [0, 1, 2, 4]].isfinite().all()
            # a NaN outside the window poisons its own map, and a tie goes to the lowest index
            y = layout.detach().clone()
            y[0, 1, 4, 7] = math.nan
            windowed = ops.soft_argmax(y, 10.0, window=1)[0]
            torch.testing.assert_close(windowed[0], torch.tensor([0.5, 0.5], device=device))
            assert windowed[1].isnan().all()


def test_values_debias(backend: str) -> None:
    """A peak on a zero background: the pull towards the centre is taken out whole; without mass nothing changes."""
    with contract.on(backend) as device:
        z = torch.zeros(1, 2, 9, 11, device=device, dtype=torch.float64)
        z[0, 0, 2, 8] = 1.0
        pulled, free = ops.soft_argmax(z, 2.0), ops.soft_argmax(z, 2.0, debias=True)
        assert (pulled[0, 0] - torch.tensor([8.0, 2.0], device=device)).abs().max() > 1
        torch.testing.assert_close(free[0, 0], torch.tensor([8.0, 2.0], device=device, dtype=torch.float64))
        torch.testing.assert_close(free[0, 1], pulled[0, 1])


def test_values_peak(backend: str) -> None:
    inf = math.inf
    with contract.on(backend) as device:
        z = torch.full((1, 6, 3, 4), -inf)
        z[0, 1, 1, 1] = z[0, 1, 1, 3] = 5.0  # a tie, and neighbours that are all -inf
        z[0, 2] = 0.0
        z[0, 2, 1, 1], z[0, 2, 1, 2], z[0, 2, 0, 1], z[0, 2, 2, 1] = 5.0, 3.0, 2.0, 2.0
        z[0, 3, 0, 0], z[0, 3, 0, 1], z[0, 3, 1, 1] = 5.0, 1.0, 4.0  # in a corner
        z[0, 4, 2, 2] = math.nan
        z[0, 5, 2, 2] = inf
        d = 0.25 / math.sqrt(2)
        expected = {
            "none": [[0, 0], [1, 1], [1, 1], [0, 0]],
            "quarter_sign": [[0, 0], [1, 1], [1.25, 1], [0, 0]],
            "quarter_second": [[0, 0], [1, 1], [1.25, 1], [d, d]],
        }
        for refine, want in expected.items():
            for layout in (z, z.contiguous(memory_format=torch.channels_last)):
                got = ops.peak(layout.to(device), refine)
                torch.testing.assert_close(got.points[0, :4].cpu(), torch.tensor(want, dtype=torch.float32))
                assert got.score[0, :4].tolist() == [-inf, 5.0, 5.0, 5.0]
                assert got.points[0, 4:].isnan().all() and got.score[0, 4:].isnan().all()


def test_values_many_landmarks() -> None:
    """Chunks of landmarks-innermost maps: their last vectors overlap, and threads share an image."""
    for landmarks in (1, 5, 33, 68, 300):
        z = torch.rand(2, landmarks, 4, 6)
        last = z.contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(ops.soft_argmax(last, 9.0), ops.soft_argmax(z, 9.0))
        torch.testing.assert_close(ops.peak(last, "quarter_sign"), ops.peak(z, "quarter_sign"), rtol=0, atol=0)


def test_gradient_keeps_the_layout() -> None:
    z = torch.rand(2, 5, 4, 6).contiguous(memory_format=torch.channels_last).requires_grad_()
    (grad,) = torch.autograd.grad(ops.soft_argmax(z, 2.0).sum(), z)
    assert grad.stride() == z.stride()


@pytest.mark.parametrize("backend", ["cpu"])
def test_beyond_31_bits(backend: str) -> None:
    z = contract.far_view((2, 1, 3, 5), torch.float16)
    z[1, 0, 2, 3] = 9.0
    assert ops.peak(z).points[1, 0].tolist() == [3, 2]
    torch.testing.assert_close(ops.soft_argmax(z, 10.0)[1, 0], torch.tensor([3.0, 2.0]))


Z, AT = torch.zeros(2, 3, 4, 5), torch.zeros(2, 3, 2)
ERRORS = [
    (lambda: ops.soft_argmax([1.0]), TypeError, r"soft_argmax: heatmap must be a tensor \[B, P, H, W\], got list"),
    (lambda: ops.soft_argmax(Z[0]), ValueError, r"soft_argmax: heatmap must be \[B, P, H, W\], got \[3, 4, 5\]"),
    (lambda: ops.soft_argmax(Z.int()), TypeError, "soft_argmax: heatmap must be float32.*got int32"),
    (lambda: ops.soft_argmax(Z[:, :, :0]), ValueError, r"at least one pixel a map, got \[2, 3, 0, 5\]"),
    (lambda: ops.soft_argmax(Z, "x"), TypeError, "soft_argmax: beta must be a number, got str"),
    (lambda: ops.soft_argmax(Z, math.nan), ValueError, "soft_argmax: beta must be finite, got nan"),
    (
        lambda: ops.soft_argmax(Z, torch.ones(2)),
        ValueError,
        r"beta must be a number or a tensor of one element, got \[2\]",
    ),
    (lambda: ops.soft_argmax(Z, torch.ones((), dtype=torch.int64)), TypeError, "beta must be.*got int64"),
    (lambda: ops.soft_argmax(Z, torch.ones((), device="meta")), ValueError, "beta's device must be cpu.*got meta"),
    (lambda: ops.soft_argmax(Z, window=-1), ValueError, "soft_argmax: window must be at least 0, got -1"),
    (lambda: ops.soft_argmax(Z, window=1.5), TypeError, "soft_argmax: window must be an int or None, got float"),
    (lambda: ops.peak(Z, "dark"), ValueError, "peak: refine must be one of 'none'.*got 'dark'"),
    (lambda: ops.peak(Z[0]), ValueError, r"peak: heatmap must be \[B, P, H, W\], got \[3, 4, 5\]"),
    (lambda: ops.render_gaussian(AT[..., :1], 1.0, (4, 4)), ValueError, r"points must be \[B, P, 2\], got \[2, 3, 1\]"),
    (lambda: ops.render_gaussian(AT, 0, (4, 4)), ValueError, "render_gaussian: sigma must be above 0, got 0"),
    (
        lambda: ops.render_gaussian(AT, torch.ones(2, 4), (4, 4)),
        ValueError,
        r"sigma's shape must be \[2, 3\].*got \[2, 4\]",
    ),
    (lambda: ops.render_gaussian(AT, 1.0, (4,)), TypeError, r"render_gaussian: size must be \(H, W\), got \(4,\)"),
    (lambda: ops.render_gaussian(AT, 1.0, (0, 4)), ValueError, "render_gaussian: H of size must be at least 1, got 0"),
    (lambda: ops.render_gaussian(AT, 1.0, (4, 4.0)), TypeError, "render_gaussian: W of size must be an int, got float"),
    (lambda: ops.render_gaussian(AT, 1.0, (4, 4), normalize="max"), ValueError, "normalize must be one of.*got 'max'"),
    (lambda: ops.render_gaussian(AT, 1.0, (4, 4), truncate=-1), ValueError, "truncate must be at least 0, got -1"),
    (lambda: ops.peak(Z.requires_grad_(True)).score.sum().backward(), RuntimeError, "peak cannot be differentiated"),
    (
        lambda: torch.ops.fastforest.heatmap_peak(Z[0], 0),
        RuntimeError,
        r"peak: heatmap must be \[B, P, H, W\], got \[3",
    ),
]


@pytest.mark.parametrize("call, kind, pattern", ERRORS, ids=lambda v: v if isinstance(v, str) else "")
def test_errors(call, kind: type[Exception], pattern: str) -> None:
    contract.check_error(call, kind, pattern)


def test_twice_differentiated_is_refused() -> None:
    z = torch.rand(1, 1, 3, 3, requires_grad=True)
    (grad,) = torch.autograd.grad(ops.soft_argmax(z).sum(), z, create_graph=True)
    contract.check_error(lambda: grad.sum().backward(), RuntimeError, "soft_argmax cannot be differentiated twice")


def test_docstrings() -> None:
    result = doctest.testmod(ops, extraglobs={"torch": torch})
    assert result.attempted >= 5 and result.failed == 0
