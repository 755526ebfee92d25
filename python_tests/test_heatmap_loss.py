"""Room `heatmap_loss`: the contract, what its formulas promise, and other libraries where they mean the same."""

from __future__ import annotations

import doctest
import importlib.util
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import contract
import pytest
import torch
from contract import Case, Operator
from torch import Tensor

from fastforest.ops import heatmap_loss as ops
from fastforest.ops._register import op
from fastforest.reference import heatmap as reference_heatmap
from fastforest.reference import heatmap_loss as reference

BATCHED = ("pred", "logits", "points", "sigma", "weight", "target")


def operator(name: str) -> Operator:
    """A gradient of exactly 0 (the softmax of one pixel) is held against the size that gradients have."""
    return Operator(
        getattr(ops, name), getattr(reference, name), BATCHED, scale={"pred": 1e-4, "logits": 1e-3, "target": 1e-4}
    )


MSE, WING, ADAPTIVE, KL, JS, VARIANCE = (
    operator(f"{name}_loss")
    for name in ("heatmap_mse", "wing", "adaptive_wing", "heatmap_kl", "heatmap_js", "heatmap_variance")
)


def maps(*shape: int, first: str = "pred", sigma: bool = False, weight: bool = False, points: bool = True):
    images, landmarks, height, width = shape

    def make(g: torch.Generator) -> dict[str, Tensor]:
        """Points up to a fifth of the canvas outside it; predictions on both sides of theta."""
        made = {first: torch.randn(shape, generator=g, dtype=torch.float64)}
        if points:
            at = torch.rand(images, landmarks, 2, generator=g, dtype=torch.float64) * 1.4 - 0.2
            made["points"] = at * torch.tensor([width, height])
        if sigma:
            made["sigma"] = 0.7 + torch.rand(images, landmarks, generator=g, dtype=torch.float64)
        if weight:
            made["weight"] = torch.rand(images, landmarks, generator=g, dtype=torch.float64)
            made["weight"][0, -1] = 0
        return made

    return make


def coordinates(images: int, landmarks: int, weight: bool = False):
    def make(g: torch.Generator) -> dict[str, Tensor]:
        pred, target = 12 * torch.randn(2, images, landmarks, 2, generator=g, dtype=torch.float64)
        made = {"pred": pred, "target": target}
        if weight:
            made["weight"] = torch.rand(images, landmarks, generator=g, dtype=torch.float64)
        return made

    return make


ROWS = {"reduction": "none"}
FIXED = {"sigma": 1.5}
MSE_CASES = [
    Case("one-pixel", maps(1, 1, 1, 1), FIXED, ("pred",)),
    Case("aligned", maps(2, 3, 16, 32), FIXED | ROWS, ("pred",)),
    Case("sigma", maps(2, 3, 7, 13, sigma=True, weight=True), {}, ("pred",)),
    Case("foreground", maps(2, 3, 17, 19, sigma=True, weight=True), ROWS | {"foreground_weight": 5.0}, ("pred",)),
    Case("mask", maps(2, 3, 17, 19), FIXED | {"mask_threshold": 0.1, "reduction": "sum"}, ("pred",)),
]
ADAPTIVE_CASES = [
    Case("one-pixel", maps(1, 1, 1, 1), FIXED, ("pred",)),
    Case("aligned", maps(2, 3, 16, 32), FIXED | ROWS, ("pred",)),
    Case("sigma", maps(2, 3, 17, 19, sigma=True, weight=True), ROWS, ("pred",)),
    Case("no-map", maps(2, 3, 7, 13), FIXED | {"weight_map": False}, ("pred",)),
    Case("wide", maps(2, 3, 17, 19), FIXED | {"dilation": 7, "threshold": 0.5, "reduction": "sum"}, ("pred",)),
    Case(
        "steep",  # (theta / epsilon)^alpha = 29: the general logarithm
        maps(2, 3, 7, 13, weight=True),
        FIXED | {"epsilon": 0.1, "alpha": 2.1, "omega": 3.0, "theta": 0.5},
        ("pred",),
    ),
]
SOFTMAX_CASES = [
    Case("one-pixel", maps(1, 1, 1, 1, first="logits"), FIXED, ("logits",)),
    Case("aligned", maps(2, 3, 16, 32, first="logits"), FIXED | ROWS, ("logits",)),
    Case("large", maps(1, 1, 40, 70, first="logits"), FIXED, ("logits",)),
    Case("sigma", maps(2, 3, 7, 13, first="logits", sigma=True, weight=True), ROWS, ("logits",)),
    Case("sum", maps(3, 5, 17, 19, first="logits", weight=True), FIXED | {"reduction": "sum"}, ("logits",)),
]
VARIANCE_CASES = [
    Case("one-pixel", maps(1, 1, 1, 1, first="logits", points=False), FIXED, ("logits",)),
    Case("aligned", maps(2, 3, 16, 32, first="logits", points=False), FIXED | ROWS, ("logits",)),
    Case("sigma", maps(2, 3, 7, 13, first="logits", sigma=True, weight=True, points=False), ROWS, ("logits",)),
]
WING_CASES = [
    Case("plain", coordinates(2, 5), {}, ("pred", "target")),
    Case("weight", coordinates(3, 4, True), {"width": 5, "epsilon": 0.5, "reduction": "none"}, ("pred", "target")),
]
EVERY = [
    *((MSE, c) for c in MSE_CASES),
    *((ADAPTIVE, c) for c in ADAPTIVE_CASES),
    *((o, c) for o in (KL, JS) for c in SOFTMAX_CASES),
    *((VARIANCE, c) for c in VARIANCE_CASES),
    *((WING, c) for c in WING_CASES),
]
CHOSEN = [
    (MSE, MSE_CASES[3]),
    (ADAPTIVE, ADAPTIVE_CASES[2]),
    (KL, SOFTMAX_CASES[3]),
    (JS, SOFTMAX_CASES[3]),
    (VARIANCE, VARIANCE_CASES[2]),
    (WING, WING_CASES[1]),
]


def name(value: object) -> str:
    if isinstance(value, Operator):
        return value.function.__name__
    return value.id if isinstance(value, Case) else str(value)


every = pytest.mark.parametrize("operator, case", EVERY, ids=name)
chosen = pytest.mark.parametrize("operator, case", CHOSEN, ids=name)
losses = pytest.mark.parametrize("operator", [MSE, ADAPTIVE, KL, JS, VARIANCE], ids=name)


def call(operator: Operator, pred: Tensor, points: Tensor, sigma: Any, **options: Any) -> Tensor:
    """A loss of maps, whatever it calls them; the variance has no points."""
    if operator is VARIANCE:
        return operator.function(pred, sigma, **options)
    return operator.function(pred, points, sigma, **options)


@pytest.mark.parametrize("dtype", contract.DTYPES, ids=lambda d: str(d)[6:])
@every
def test_contract_agreement(operator: Operator, case: Case, backend: str, dtype: torch.dtype) -> None:
    """Low precision is computed in float32 by the operators: the reference in that precision is no measure of it."""
    if dtype in contract.RELATIVE:
        contract.check_agreement(operator, case, backend, dtype)
        return
    with contract.on(backend) as device:
        given = contract.tensors(case, dtype, device)
        got, grads = contract.with_gradients(operator.function, case, given)
    expected, expected_grads = contract.with_gradients(
        operator.reference, case, {k: v.double() for k, v in given.items()}
    )
    for g, e in zip(got, expected, strict=True):
        assert g.dtype == torch.float32
        assert contract.error(g, e) <= contract.RELATIVE[torch.float32]
    for k, e in expected_grads.items():
        assert grads[k].dtype == dtype
        assert contract.error(grads[k], e, operator.scale[k]) <= contract.ROUNDING[dtype]


@every
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


@pytest.mark.parametrize("dtype", contract.DTYPES, ids=lambda d: str(d)[6:])
@every
def test_contract_soiled_memory(operator: Operator, case: Case, backend: str, dtype: torch.dtype) -> None:
    contract.check_soiled_memory(operator, case, backend, dtype)


@chosen
def test_contract_empty(operator: Operator, case: Case, backend: str) -> None:
    contract.check_empty(operator, case, backend)


@chosen
def test_contract_rows_apart(operator: Operator, case: Case, backend: str) -> None:
    given = contract.tensors(case)
    for bad in given:
        contract.check_rows_apart(operator, case, backend, bad, (math.nan, math.inf, -math.inf))


@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_instruction_sets(rerun_under, isa: str) -> None:
    rerun_under(isa, __file__, "test_contract and cpu or values and cpu")


@chosen
def test_compile(operator: Operator, case: Case) -> None:
    """wing_loss is PyTorch's own: the compiler's logarithm is not the eager one, bit by bit."""
    if operator is WING:
        operator = Operator(WING.function, WING.reference, WING.batched, fused=False)
    contract.check_compile(operator, case)


@chosen
def test_vmap(operator: Operator, case: Case, backend: str) -> None:
    contract.check_vmap(operator, case, backend)


@chosen
def test_autocast(operator: Operator, case: Case, backend: str) -> None:
    contract.check_autocast(operator, case, backend, same=True)


def test_opcheck(backend: str) -> None:
    with contract.on(backend) as device:
        z = torch.randn(2, 3, 5, 7, device=device, requires_grad=True)
        at, sigma, weight = torch.rand(2, 3, 2, device=device), torch.rand(2, 3, device=device) + 0.5, None
        contract.check_opcheck(op("heatmap_loss_mse").default, z, at, sigma, 1.0, weight, 2.0, 1.0, 0.1)
        weight = torch.rand(2, 3, device=device)
        contract.check_opcheck(
            op("heatmap_loss_adaptive_wing").default, z, at, None, 1.0, weight, 2.1, 14.0, 1.0, 0.5, 1, 0.2
        )
        for kind in range(3):
            args = (z, None if kind == ops.VARIANCE else at, sigma, 1.0, weight, kind)
            contract.check_opcheck(op("heatmap_loss_softmax").default, *args)


# values


@losses
def test_values_hidden(operator: Operator, backend: str) -> None:
    """Weight 0 hides NaN in the map, its point and its sigma, in value and gradient; and mean is over weights."""
    nan = math.nan
    with contract.on(backend) as device:
        clean = torch.randn(1, 4, 6, 9, device=device)
        points = torch.rand(1, 4, 2, device=device) * 5
        sigma = torch.full((1, 4), 1.5, device=device)
        weight = torch.tensor([[2.0, 0.0, 0.5, 0.0]], device=device)
        for layout in (torch.contiguous_format, torch.channels_last):
            dirty, at, wide = clean.clone(memory_format=layout), points.clone(), sigma.clone()
            dirty[0, 1], at[0, 1], wide[0, 1] = nan, nan, nan
            dirty[0, 3], at[0, 3, 0], wide[0, 3] = math.inf, -math.inf, 0.0
            dirty.requires_grad_()
            rows = call(operator, dirty, at, wide, weight=weight, reduction="none")
            plain = call(operator, clean, points, sigma, reduction="none")
            torch.testing.assert_close(rows[0, ::2], weight[0, ::2] * plain[0, ::2])
            assert rows[0, 1::2].eq(0).all()
            mean = call(operator, dirty, at, wide, weight=weight)
            torch.testing.assert_close(mean, (2 * plain[0, 0] + 0.5 * plain[0, 2]) / 2.5)
            (grad,) = torch.autograd.grad(mean, dirty)
            assert grad[0, 1::2].eq(0).all() and grad.isfinite().all() and grad[0, ::2].abs().sum() > 0
            assert grad.stride() == dirty.stride()
        none = call(operator, dirty, at, wide, weight=torch.zeros(1, 4, device=device))
        assert none == 0 and torch.autograd.grad(none, dirty)[0].eq(0).all()


@losses
def test_values_invalid(operator: Operator, backend: str) -> None:
    """A point or sigma that is no place or width makes its own row NaN; so does NaN in the map."""
    with contract.on(backend) as device:
        z = torch.randn(1, 5, 4, 7, device=device)
        points = torch.rand(1, 5, 2, device=device) * 3
        sigma = torch.ones(1, 5, device=device)
        z[0, 0, 3, 6] = math.nan
        sigma[0, 1], sigma[0, 2] = 0.0, math.inf
        points[0, 3, 1] = math.nan
        bad = [0, 1, 2] if operator is VARIANCE else [0, 1, 2, 3]
        good = [i for i in range(5) if i not in bad]
        rows = call(operator, z.requires_grad_(), points, sigma, reduction="none")
        (grad,) = torch.autograd.grad(rows.sum(), z)
        assert rows[0, bad].isnan().all() and rows[0, good].isfinite().all()
        assert grad[0, bad[1:]].isnan().all() and grad[0, good].isfinite().all()
        assert grad[0, 0].isnan().any()


def test_values_off_canvas(backend: str) -> None:
    """Peak targets fade away; sum targets stay whole, in the end on the nearest pixels."""
    points = torch.tensor([[[-3.0, 2.0], [400.0, 2.0], [-500.0, -500.0], [3e6, 3.0], [1.5, 1e9]]])
    z = torch.randn(1, 5, 6, 8, generator=torch.Generator().manual_seed(0))
    for operator in (MSE, ADAPTIVE, KL, JS):
        with contract.on(backend) as device:
            got = operator.function(z.to(device), points.to(device), 1.5, reduction="none").cpu()
        expected = operator.reference(z.double(), points.double(), 1.5, reduction="none")
        assert contract.error(got, expected) <= 1e-5
    with contract.on(backend) as device:
        far = ops.heatmap_kl_loss(z.to(device), points.to(device), 1.5, reduction="none")
        corner = -torch.log_softmax(z[0, 2].flatten(), 0)[0]
        torch.testing.assert_close(far[0, 2].cpu(), corner)


def test_values_masked_logits(backend: str) -> None:
    """-inf is a pixel of probability 0: free where the target is 0, infinitely wrong for KL elsewhere."""
    inf = math.inf
    with contract.on(backend) as device:
        z = torch.randn(1, 4, 6, 90, device=device)
        points = torch.tensor([[[5.0, 3.0]] * 4], device=device)
        z[0, 0, :, 80:] = -inf
        z[0, 1, 3, 5] = -inf
        z[0, 2] = -inf
        z[0, 3, 0, 0] = inf
        z.requires_grad_()
        kl = ops.heatmap_kl_loss(z, points, 1.0, reduction="none")[0]
        assert kl[0].isfinite() and kl[1] == inf and kl[2:].isnan().all()
        (grad,) = torch.autograd.grad(kl[:2].sum(), z)
        assert grad[0, :2].isfinite().all() and grad[0, 0, :, 80:].eq(0).all()
        js = ops.heatmap_js_loss(z, points, 1.0, reduction="none")[0]
        assert js[:2].isfinite().all() and js[2:].isnan().all()
        variance = ops.heatmap_variance_loss(z, 1.0, reduction="none")[0]
        assert variance[:2].isfinite().all() and variance[2:].isnan().all()
        for rows in (js, variance):
            (grad,) = torch.autograd.grad(rows[:2].sum(), z)
            assert grad[0, :2].isfinite().all()


def test_values_huge_logits(backend: str) -> None:
    """The softmax does not overflow, and one number for log-sum-exp would lose it: 7e4 is known to 0.008 only."""
    z = torch.randn(1, 2, 9, 11, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    z = (z * torch.tensor([1.0, 1e4]).view(1, 2, 1, 1) + 7e4).float()
    points = torch.tensor([[[3.0, 4.0], [7.0, 2.0]]])
    for operator in (KL, JS, VARIANCE):
        with contract.on(backend) as device:
            leaf = z.to(device).requires_grad_()
            got = call(operator, leaf, points.to(device), 1.5, reduction="none")
            (grad,) = torch.autograd.grad(got.sum(), leaf)
        exact = z.double().requires_grad_()
        args = (exact, 1.5) if operator is VARIANCE else (exact, points.double(), 1.5)
        expected = operator.reference(*args, reduction="none")
        (expected_grad,) = torch.autograd.grad(expected.sum(), exact)
        assert contract.error(got, expected.detach()) <= 1e-5
        assert contract.error(grad, expected_grad) <= 1e-5


def test_values_perfect(backend: str) -> None:
    """The target itself as prediction: every loss is 0, and so is its gradient, but for Adaptive Wing's: its slope at a
    peak grows like d^0.1, and two roundings of the target differ.
    """
    points = torch.tensor([[[3.3, 4.1], [20.0, 9.5]]], dtype=torch.float64)
    peak = reference_heatmap.render_gaussian(points, 1.7, (12, 25))
    log = reference_heatmap.render_gaussian(points, 1.7, (12, 25), normalize="sum").log()
    for operator, z in ((MSE, peak), (ADAPTIVE, peak), (KL, log), (JS, log)):
        for dtype, limit in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
            with contract.on(backend) as device:
                leaf = z.to(dtype).to(device).requires_grad_()
                got = call(operator, leaf, points.to(dtype).to(device), 1.7)
                (grad,) = torch.autograd.grad(got, leaf)
            assert got.abs() <= limit
            assert operator is ADAPTIVE or grad.abs().max() <= limit


def test_values_the_variance_of_a_spike_at_the_rim(backend: str) -> None:
    """Moments about the mean, not about the origin: 4 of 512^2 would drown in float32."""
    points = torch.tensor([[[500.0, 3.0]]], dtype=torch.float64)
    z = (reference_heatmap.render_gaussian(points, 2.0, (8, 512)) + 1e-30).log()
    exact = z.clone().requires_grad_()
    expected = reference.heatmap_variance_loss(exact, 1.0)
    with contract.on(backend) as device:
        leaf = z.float().to(device).requires_grad_()
        got = ops.heatmap_variance_loss(leaf, 1.0)
    assert contract.error(got.detach(), expected.detach()) <= 1e-5
    (grad,), (wanted,) = torch.autograd.grad(got, leaf), torch.autograd.grad(expected, exact)
    assert contract.error(grad, wanted) <= 1e-5


@pytest.mark.parametrize("threshold", [-1.0, 0.0, 1e-3, 0.2, 1.0, 2.0])
@pytest.mark.parametrize("dilation", [1, 3, 5, 41])
def test_values_weight_map(backend: str, dilation: int, threshold: float) -> None:
    """The dilated target is that of max_pool2d at every pixel: the gradient of a unit error says 11 or 1."""
    points = torch.rand(1, 12, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * 30 - 7
    points[0, 0] = torch.tensor([4.0, 5.0], dtype=torch.float64)
    target = reference_heatmap.render_gaussian(points, 1.6, (16, 17))
    wide = torch.nn.functional.max_pool2d(target, dilation, 1, dilation // 2)
    with contract.on(backend) as device:
        leaf = (target + 0.25).to(device).requires_grad_()
        given = {"dilation": dilation, "threshold": threshold, "reduction": "sum"}
        flat, mapped = (
            torch.autograd.grad(ops.adaptive_wing_loss(leaf, points.to(device), 1.6, weight_map=w, **given), leaf)[0]
            for w in (False, True)
        )
    torch.testing.assert_close((mapped / flat).cpu(), torch.where(wide >= threshold, 11.0, 1.0).double())


def test_values_near_theta(backend: str) -> None:
    """Both branches, their joint, 0, and errors so small that float32 would lose log(1 + q) without log1p."""
    d = torch.tensor([0.0, 1e-30, 1e-12, 1e-6, 1e-3, 0.1, 0.5 - 1e-9, 0.5, 0.5 + 1e-9, 1.0, 40.0, 1e6])
    for target in (0.0, 1.0):
        points = torch.zeros(1, 24, 2) if target else torch.full((1, 24, 2), 900.0)
        z = torch.cat([target + d, target - d]).view(1, 24, 1, 1).double()
        for options in ({}, {"epsilon": 0.2}, {"theta": 2.0}):
            exact = z.clone().requires_grad_()
            expected = reference.adaptive_wing_loss(exact, points.double(), 2.0, reduction="none", **options)
            (wanted,) = torch.autograd.grad(expected.sum(), exact)
            for dtype, rtol in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
                if target and dtype == torch.float32:
                    continue  # 1 + 1e-12 is 1
                with contract.on(backend) as device:
                    leaf = z.to(dtype).to(device).requires_grad_()
                    got = ops.adaptive_wing_loss(leaf, points.to(dtype).to(device), 2.0, reduction="none", **options)
                    (grad,) = torch.autograd.grad(got.sum(), leaf)
                # Powers far below 1 underflow in float32.
                torch.testing.assert_close(got.double().cpu(), expected.detach(), rtol=rtol, atol=1e-36)
                torch.testing.assert_close(grad.double().cpu(), wanted, rtol=rtol, atol=1e-8)


def test_values_many_landmarks() -> None:
    """Groups of landmarks-innermost maps: whole, cut short, and of one."""
    for landmarks in (1, 15, 16, 17, 68):
        z = torch.randn(2, landmarks, 5, 35)
        points = torch.rand(2, landmarks, 2) * 20
        for operator in (MSE, ADAPTIVE, KL, JS, VARIANCE):
            a = z.clone().requires_grad_()
            b = z.contiguous(memory_format=torch.channels_last).requires_grad_()
            plain, last = (call(operator, t, points, 2.0, reduction="none") for t in (a, b))
            assert torch.equal(plain, last)
            (grad,) = torch.autograd.grad(last.sum(), b)
            assert torch.equal(torch.autograd.grad(plain.sum(), a)[0], grad)
            assert grad.stride() == b.stride()


@pytest.mark.parametrize("operator", [MSE, ADAPTIVE, KL, JS, VARIANCE], ids=name)
def test_the_graph_can_be_kept(operator: Operator) -> None:
    z = torch.randn(2, 3, 8, 9, requires_grad=True)
    loss = call(operator, z, torch.rand(2, 3, 2) * 7, 1.5)
    (first,) = torch.autograd.grad(loss, z, retain_graph=True)
    (second,) = torch.autograd.grad(3 * loss, z)
    torch.testing.assert_close(second, 3 * first)


@pytest.mark.parametrize("operator", [MSE, ADAPTIVE, KL, JS, VARIANCE], ids=name)
def test_beyond_31_bits(operator: Operator) -> None:
    z = contract.far_view((2, 1, 3, 5), torch.float16)
    z[1, 0] = torch.randn(3, 5)
    points = torch.tensor([[[1.0, 1.0]], [[3.0, 0.5]]])
    rows = call(operator, z, points, 1.0, reduction="none")
    torch.testing.assert_close(rows, call(operator, z.clone(), points, 1.0, reduction="none"))


MEMORY = """
import ctypes, pathlib, sys
import torch
from fastforest.ops import heatmap_loss as ops

def status(field):
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])

pred = torch.randn(2, 256, 128, 128, requires_grad=True)
if sys.argv[2] == "last":
    pred = pred.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
points = torch.rand(2, 256, 2) * 127
small = pred.detach()[:, :20].requires_grad_()
loss = getattr(ops, sys.argv[1])
args = lambda z: (z, 2.0) if "variance" in sys.argv[1] else (z, points[:, : z.shape[1]], 2.0)
torch.autograd.grad(loss(*args(small)), small)  # libraries, thread pools
ctypes.CDLL("libc.so.6").malloc_trim(0)
pathlib.Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS:")
torch.autograd.grad(loss(*args(pred)), pred)
print((status("VmHWM:") - before) / pred.nbytes)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux only")
@pytest.mark.parametrize("layout", ["planar", "last"])
@losses
def test_memory(operator: Operator, layout: str) -> None:
    """Forward and backward need the gradient and next to nothing else: under 1.15 predictions, with room in it for
    huge pages and, for landmarks-innermost maps, 16 maps a thread."""
    root = Path(ops.__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, operator.function.__name__, layout],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert 0.9 < float(done.stdout) < 1.15


# other libraries, where they mean the same


def library(name: str) -> Any:
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    return importlib.import_module(name)


def against(theirs: Callable[[Tensor], Tensor], ours: Callable[[Tensor], Tensor]) -> None:
    """Values and gradients in float64 of logits [2, 3, 24, 31]."""
    z = torch.randn(2, 3, 24, 31, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = []
    for loss in (ours, theirs):
        leaf = z.clone().requires_grad_()
        rows = loss(leaf)
        assert rows.shape == (2, 3)
        found.append((rows.detach(), *torch.autograd.grad(rows.square().sum(), leaf)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


POINTS = torch.tensor([[[5.0, 6.0], [20.5, 11.2], [30.0, 0.0]], [[12.0, 23.0], [2.2, 3.3], [15.5, 15.5]]]).double()


def test_kornia() -> None:
    """kornia's divergences are of probabilities, and it renders no target: its own renderer's is given to both."""
    losses, geometry = library("kornia.losses"), library("kornia.geometry.subpix")

    def target(z: Tensor) -> Tensor:
        mean = POINTS.flatten(0, 1)
        std = torch.full_like(mean, 1.5)
        return geometry.render_gaussian2d(mean, std, (24, 31), normalized_coordinates=False).view(2, 3, 24, 31)

    def probability(z: Tensor) -> Tensor:
        return torch.softmax(z.flatten(2), -1).view(z.shape)

    against(
        lambda z: losses.kl_div_loss_2d(probability(z), target(z), reduction="none"),
        lambda z: ops.heatmap_kl_loss(z, POINTS, 1.5, reduction="none"),
    )
    against(
        lambda z: losses.js_div_loss_2d(probability(z), target(z), reduction="none"),
        lambda z: ops.heatmap_js_loss(z, POINTS, 1.5, reduction="none"),
    )


def test_dsntnn() -> None:
    """Its KL is the other direction, KL(p || y), and is not ours; coordinates are normalised between pixel edges."""
    dsntnn = library("dsntnn")
    centre = (2 * POINTS + 1) / torch.tensor([31.0, 24.0]) - 1
    against(
        lambda z: dsntnn.js_reg_losses(dsntnn.flat_softmax(z), centre, 1.5),
        lambda z: ops.heatmap_js_loss(z, POINTS, 1.5, reduction="none"),
    )
    against(
        lambda z: dsntnn.variance_reg_losses(dsntnn.flat_softmax(z), 1.5),
        lambda z: ops.heatmap_variance_loss(z, 1.5, reduction="none"),
    )
    against(
        lambda z: torch.nn.functional.mse_loss(
            z, dsntnn.make_gauss(centre, [24, 31], 1.5, normalize=False), reduction="none"
        ).mean((-2, -1)),
        lambda z: ops.heatmap_mse_loss(z, POINTS, 1.5, reduction="none"),
    )


# errors

Z, AT, W = torch.zeros(2, 3, 4, 5), torch.zeros(2, 3, 2), torch.ones(2, 3)
ERRORS = [
    (lambda: ops.heatmap_mse_loss([1.0], AT, 1), TypeError, r"heatmap_mse_loss: pred must be a tensor \[B, P, H, W\]"),
    (lambda: ops.heatmap_kl_loss(Z[0], AT, 1), ValueError, r"heatmap_kl_loss: logits must be.*got \[3, 4, 5\]"),
    (lambda: ops.heatmap_js_loss(Z.int(), AT, 1), TypeError, "heatmap_js_loss: logits must be float32.*got int32"),
    (lambda: ops.heatmap_variance_loss(Z[:, :, :0], 1), ValueError, r"at least one pixel a map, got \[2, 3, 0, 5\]"),
    (
        lambda: ops.heatmap_mse_loss(torch.zeros(1, device="meta").expand(1, 1, 2**15, 2**15), AT.to("meta"), 1),
        ValueError,
        r"below 2\^30 pixels a map",
    ),
    (lambda: ops.heatmap_mse_loss(Z, AT[..., :1], 1), ValueError, r"points must be \[B, P, 2\], got \[2, 3, 1\]"),
    (lambda: ops.heatmap_mse_loss(Z, AT[:1], 1), ValueError, r"points' shape must be \[2, 3, 2\].*got \[1, 3, 2\]"),
    (lambda: ops.heatmap_mse_loss(Z, AT.to("meta"), 1), ValueError, "points must be on cpu.*got meta"),
    (lambda: ops.heatmap_mse_loss(Z, AT, 0), ValueError, "heatmap_mse_loss: sigma must be above 0, got 0"),
    (lambda: ops.heatmap_mse_loss(Z, AT, "1"), TypeError, "heatmap_mse_loss: sigma must be a number, got str"),
    (lambda: ops.heatmap_kl_loss(Z, AT, torch.ones(3)), ValueError, r"sigma must be \[B, P\], got \[3\]"),
    (lambda: ops.heatmap_kl_loss(Z, AT, torch.ones(2, 4)), ValueError, r"sigma's shape must be \[2, 3\].*\[2, 4\]"),
    (lambda: ops.heatmap_kl_loss(Z, AT, 1, weight=W[0]), ValueError, r"weight must be \[B, P\], got \[3\]"),
    (lambda: ops.heatmap_kl_loss(Z, AT, 1, weight=W[:1]), ValueError, r"weight's shape must be \[2, 3\]"),
    (lambda: ops.heatmap_kl_loss(Z, AT, 1, weight=W.long()), TypeError, "weight must be float32.*got int64"),
    (lambda: ops.heatmap_js_loss(Z, AT, 1, reduction="max"), ValueError, "reduction must be one of.*got 'max'"),
    (lambda: ops.heatmap_mse_loss(Z, AT, 1, reduction=None), ValueError, "reduction must be one of.*got None"),
    (lambda: ops.heatmap_mse_loss(Z, AT, 1, foreground_weight=-1), ValueError, "foreground_weight must be at least 0"),
    (lambda: ops.heatmap_mse_loss(Z, AT, 1, mask_threshold="a"), TypeError, "mask_threshold must be a number"),
    (lambda: ops.adaptive_wing_loss(Z, AT, 1, alpha=1), ValueError, "adaptive_wing_loss: alpha must be above 1, got 1"),
    (lambda: ops.adaptive_wing_loss(Z, AT, 1, omega=0), ValueError, "omega must be above 0, got 0"),
    (lambda: ops.adaptive_wing_loss(Z, AT, 1, epsilon=0), ValueError, "epsilon must be above 0, got 0"),
    (lambda: ops.adaptive_wing_loss(Z, AT, 1, theta=-1), ValueError, "theta must be above 0, got -1"),
    (lambda: ops.adaptive_wing_loss(Z, AT, 1, epsilon=1e-9), ValueError, r"must be at most 1e6, got \(0.5 / 1e-09\)"),
    (lambda: ops.adaptive_wing_loss(Z, AT, 1, dilation=2), ValueError, "dilation must be odd and at least 1, got 2"),
    (lambda: ops.adaptive_wing_loss(Z, AT, 1, dilation=3.0), TypeError, "dilation must be an int, got float"),
    (lambda: ops.adaptive_wing_loss(Z, AT, 1, threshold=None), TypeError, "threshold must be a number, got NoneType"),
    (lambda: ops.wing_loss(AT, AT[:1]), ValueError, r"wing_loss: target must be \[2, 3, 2\].*got \[1, 3, 2\]"),
    (lambda: ops.wing_loss(AT[0], AT[0]), ValueError, r"wing_loss: pred must be \[B, P, D\], got \[3, 2\]"),
    (lambda: ops.wing_loss(AT, AT, 0), ValueError, "wing_loss: width must be above 0, got 0"),
    (lambda: ops.wing_loss(AT, AT, epsilon=0), ValueError, "wing_loss: epsilon must be above 0, got 0"),
    (
        lambda: torch.ops.fastforest.heatmap_loss_mse(Z[0], AT, None, 1.0, None, 1.0, 1.0, 0.0),
        RuntimeError,
        r"heatmap_mse_loss: pred must be \[B, P, H, W\], got \[3",
    ),
    (
        lambda: torch.ops.fastforest.heatmap_loss_softmax(Z, AT[:1], None, 1.0, None, 0),
        RuntimeError,
        r"heatmap_kl_loss: points must be \[B, P, 2\] with \[B, P\] = \[2, 3\], got \[1, 3, 2\]",
    ),
    (
        lambda: torch.ops.fastforest.heatmap_loss_softmax(Z, AT, None, 1.0, None, 3),
        RuntimeError,
        "kind must be 0, 1 or 2, got 3",
    ),
    (
        lambda: torch.ops.fastforest.heatmap_loss_softmax(Z, None, None, 1.0, None, 1),
        RuntimeError,
        "heatmap_js_loss: points belong to kinds 0 and 1 alone",
    ),
    (
        lambda: torch.ops.fastforest.heatmap_loss_softmax_backward(W, Z, AT, None, 1.0, None, 0, W),
        RuntimeError,
        "heatmap_kl_loss backward: statistics must be as the forward returned them",
    ),
]


@pytest.mark.parametrize("call, kind, pattern", ERRORS, ids=lambda v: v if isinstance(v, str) else "")
def test_errors(call, kind: type[Exception], pattern: str) -> None:
    contract.check_error(call, kind, pattern)


@losses
def test_twice_differentiated_is_refused(operator: Operator) -> None:
    z = torch.randn(1, 1, 3, 3, requires_grad=True)
    loss = call(operator, z, torch.ones(1, 1, 2), 1.0)
    (grad,) = torch.autograd.grad(loss, z, create_graph=True)
    contract.check_error(lambda: grad.sum().backward(), RuntimeError, "heatmap_loss_.* cannot be differentiated twice")


def test_docstrings() -> None:
    result = doctest.testmod(ops, extraglobs={"torch": torch}, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.attempted >= 6 and result.failed == 0
