"""Room `routing`: the contract, and what its formulas promise."""

from __future__ import annotations

import math

import contract
import pytest
import torch
from contract import Case, Operator
from torch import Tensor

from fastforest.ops import routing as ops
from fastforest.ops._register import op
from fastforest.reference import routing as reference

ROUTE = Operator(ops.route, reference.route, ("units",))


def forest(samples: int, units: int, trees: int, depth: int, steepness: float | None = None):
    def make(g: torch.Generator) -> dict[str, Tensor]:
        made = {
            "units": 2 * torch.randn(samples, units, generator=g, dtype=torch.float64),
            "phi": torch.randint(units, (trees, 2**depth - 1), generator=torch.Generator().manual_seed(5)),
        }
        if steepness is not None:
            made["steepness"] = torch.tensor(steepness, dtype=torch.float64)
        return made

    return make


UNITS = ("units",)
CASES = [
    Case("ones", forest(1, 1, 1, 1), {}, UNITS),
    Case("ones-log", forest(1, 1, 1, 1), {"log": True}, UNITS),
    Case("shallow", forest(17, 3, 5, 2, 1.5), {}, ("units", "steepness")),
    Case("shallow-log", forest(5, 37, 7, 3), {"log": True, "steepness": 0.5}, UNITS),
    Case("papers", forest(33, 128, 5, 6), {}, UNITS),
    Case("shared", forest(19, 2, 3, 5, 0.7), {}, ("units", "steepness")),  # 93 nodes read 2 units
    Case("shared-log", forest(19, 2, 3, 5, 0.7), {"log": True}, ("units", "steepness")),
    Case("deep-log", forest(3, 41, 2, 9), {"log": True, "steepness": 3}, UNITS),
]
every = contract.cases(*CASES)
chosen = contract.cases(CASES[3], CASES[5], CASES[6])


@pytest.mark.parametrize("dtype", contract.DTYPES, ids=lambda d: str(d)[6:])
@every
def test_contract_agreement(case: Case, backend: str, dtype: torch.dtype) -> None:
    contract.check_agreement(ROUTE, case, backend, dtype)


@contract.cases(*CASES[:4], *CASES[5:7])
def test_contract_gradcheck(case: Case, backend: str) -> None:
    contract.check_gradcheck(ROUTE, case, backend)


@every
def test_contract_strides(case: Case, backend: str) -> None:
    contract.check_strides(ROUTE, case, backend)


@chosen
def test_contract_repeatable(case: Case, backend: str) -> None:
    contract.check_repeatable(ROUTE, case, backend)


@pytest.mark.parametrize("dtype", contract.DTYPES, ids=lambda d: str(d)[6:])
@every
def test_contract_soiled_memory(case: Case, backend: str, dtype: torch.dtype) -> None:
    contract.check_soiled_memory(ROUTE, case, backend, dtype)


@chosen
def test_contract_empty(case: Case, backend: str) -> None:
    with contract.on(backend) as device:
        given = contract.tensors(case, torch.float32, device)
        for samples, trees in ((0, 3), (2, 0), (0, 0)):
            units = given["units"][:samples].detach().requires_grad_()
            leaf = ops.route(units, given["phi"][:trees], **case.options)
            assert list(leaf.shape) == [samples, trees, given["phi"].shape[1] + 1]
            (grad,) = torch.autograd.grad(leaf.sum(), units)
            assert grad.shape == units.shape and grad.eq(0).all()


@chosen
def test_contract_rows_apart(case: Case, backend: str) -> None:
    with contract.on(backend) as device:
        given = contract.tensors(case, torch.float32, device)
        plain, plain_grads = contract.with_gradients(ROUTE.function, case, given)
        for value in (math.nan, math.inf, -math.inf):
            poisoned = given | {"units": given["units"].clone()}
            poisoned["units"][1, 0] = value
            got, grads = contract.with_gradients(ROUTE.function, case, poisoned)
            rest = [n for n in range(len(given["units"])) if n != 1]
            assert torch.equal(got[0][rest], plain[0][rest])
            assert torch.equal(grads["units"][rest], plain_grads["units"][rest])


@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_instruction_sets(rerun_under, isa: str) -> None:
    rerun_under(isa, __file__, "test_contract and cpu or values and cpu")


@chosen
def test_compile(case: Case) -> None:
    contract.check_compile(ROUTE, case)


def test_annealing_does_not_recompile() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(ops.route, fullgraph=True)
    units, phi = torch.randn(3, 4), ops.draw_phi(4, 2, 3)
    compiled(units, phi, torch.tensor(1.0))
    with torch.compiler.set_stance("fail_on_recompile"):
        got = compiled(units, phi, torch.tensor(2.0))
    assert torch.equal(got, ops.route(units, phi, 2.0))


@chosen
def test_vmap(case: Case, backend: str) -> None:
    contract.check_vmap(ROUTE, case, backend)


def test_vmap_over_phi(backend: str) -> None:
    with contract.on(backend) as device:
        units = torch.randn(5, 4, device=device)
        phi = torch.stack([ops.draw_phi(4, 2, 3, seed) for seed in range(3)]).to(device)
        got = torch.vmap(ops.route, (None, 0))(units, phi)
        assert torch.equal(got, torch.stack([ops.route(units, p) for p in phi]))


@chosen
def test_autocast(case: Case, backend: str) -> None:
    contract.check_autocast(ROUTE, case, backend, same=True)


def test_opcheck(backend: str) -> None:
    with contract.on(backend) as device:
        units = torch.randn(5, 4, device=device, requires_grad=True)
        scale = torch.tensor([2.0], device=device, requires_grad=True)
        phi = ops.draw_phi(4, 2, 3).to(device)
        contract.check_opcheck(op("routing_route").default, units, phi, scale, 1.0, False)
        contract.check_opcheck(op("routing_route").default, units, phi.int(), None, 2.0, True)


# values


@pytest.mark.parametrize("log", [False, True], ids=["linear", "log"])
def test_values_shared_units(backend: str, log: bool) -> None:
    """Finite differences where every unit is read by many nodes of many trees: assigning is off by half."""
    with contract.on(backend) as device:
        g = torch.Generator().manual_seed(3)
        units = torch.randn(4, 5, generator=g, dtype=torch.float64).to(device).requires_grad_()
        phi = ops.draw_phi(5, 6, 6, seed=1).to(device)
        weight = torch.randn(4, 6, 64, generator=g, dtype=torch.float64).to(device)
        risk = lambda u: (ops.route(u, phi, 1.3, log=log) * weight).sum()  # noqa: E731
        (grad,) = torch.autograd.grad(risk(units), units)
        step, flat = 1e-6, units.detach().flatten()
        for i in range(0, len(flat), 3):
            shift = torch.zeros_like(flat).index_fill_(0, torch.tensor([i], device=device), step).view(4, 5)
            numeric = (risk(units.detach() + shift) - risk(units.detach() - shift)) / (2 * step)
            assert abs(numeric - grad.flatten()[i]) <= 1e-7 * grad.abs().max()


def test_values_order(backend: str) -> None:
    """Hard splits: the leaf is read off the path, left first; phi int32 and int64 alike."""
    with contract.on(backend) as device:
        phi = torch.arange(7, device=device)[None]
        for leaf in range(8):
            units = torch.zeros(1, 7)
            node = 0
            for bit in (leaf >> 2 & 1, leaf >> 1 & 1, leaf & 1):
                units[0, node] = -math.inf if bit else math.inf
                node = 2 * node + 1 + bit
            units = units.to(device).requires_grad_()
            for index in (phi, phi.int()):
                p = ops.route(units, index)
                assert p[0, 0].tolist() == [float(i == leaf) for i in range(8)]
                logs = ops.route(units, index, log=True)
                assert logs[0, 0, leaf] == 0 and logs[0, 0].exp().sum() == 1
                for out in (p, logs):
                    weight = torch.arange(8.0, device=device)
                    (grad,) = torch.autograd.grad(torch.where(out.isfinite(), out, 0.0) @ weight, units)
                    assert grad.isfinite().all()


@pytest.mark.parametrize("depth", [12, 16])
def test_values_deep(backend: str, depth: int) -> None:
    """No underflow in log space; every probability sums to 1; subtrees, scratch memory and all."""
    if backend == "shim" and depth == 16:
        pytest.skip("65,536 leaves on fibers take minutes; the sanitizers' driver runs the scratch path")
    with contract.on(backend) as device:
        phi = ops.draw_phi(50, 1, depth).to(device)
        units = torch.randn(2, 50, generator=torch.Generator().manual_seed(1)).to(device).requires_grad_()
        logs = ops.route(units, phi, 60.0, log=True)
        assert logs.isfinite().all() and logs.min() < -200
        exact = ops.route(
            units.detach().double().cpu() if backend == "cuda" else units.detach().double(), phi, 60.0, log=True
        )
        assert contract.error(logs, exact) <= 1e-6
        torch.testing.assert_close(
            logs.double().logsumexp(-1), torch.zeros(2, 1, dtype=torch.float64, device=device), atol=1e-4, rtol=0
        )
        p = ops.route(units, phi, 2.0)
        torch.testing.assert_close(p.sum(-1), torch.ones(2, 1, device=device), atol=1e-5, rtol=0)
        # The sum of all leaves is constant: its gradient is 0; that of the log of one leaf is known.
        assert torch.autograd.grad(p.sum(), units, retain_graph=True)[0].abs().max() <= 1e-6
        (grad,) = torch.autograd.grad(ops.route(units, phi, 0.5, log=True)[:, 0, 0].sum(), units)
        path = [2**level - 1 for level in range(depth)]
        expected = torch.zeros_like(units)
        for node in path:
            u = int(phi[0, node])
            expected[:, u] += 0.5 * torch.sigmoid(-0.5 * units.detach()[:, u])
        torch.testing.assert_close(grad, expected, atol=1e-5, rtol=1e-5)


def test_values_small_probabilities(backend: str) -> None:
    """The small side of a steep split keeps its digits, and rounding does not reach the gradient."""
    with contract.on(backend) as device:
        units = torch.tensor([[20.0], [-20.0]], device=device, requires_grad=True)
        phi = torch.zeros(1, 1, dtype=torch.int64, device=device)
        p = ops.route(units, phi)
        tiny = 1 / (1 + math.exp(20.0))
        torch.testing.assert_close(p[0, 0, 1].item(), tiny, rtol=1e-5, atol=0)
        torch.testing.assert_close(p[1, 0, 0].item(), tiny, rtol=1e-5, atol=0)
        (grad,) = torch.autograd.grad(p[:, 0, 1].sum(), units)
        torch.testing.assert_close(grad, torch.full_like(grad, -tiny), rtol=1e-5, atol=0)
        logs = ops.route(units, phi, log=True)
        torch.testing.assert_close(logs[0, 0, 0].item(), -math.exp(-20.0), rtol=1e-5, atol=0)


def test_values_nan(backend: str) -> None:
    """A NaN unit reaches the leaves below the nodes that read it, and its sample's gradient; no other sample."""
    with contract.on(backend) as device:
        units = torch.zeros(3, 7, device=device)
        units[1, 2] = math.nan
        units.requires_grad_()
        phi = torch.arange(7, device=device)[None]
        for log in (False, True):
            p = ops.route(units, phi, log=log)
            assert p[1, 0, 4:].isnan().all() and p[1, 0, :4].isfinite().all() and p[[0, 2]].isfinite().all()
            (grad,) = torch.autograd.grad(p.sum(), units)
            assert grad[1].isnan().any() and grad[[0, 2]].isfinite().all()


def test_values_phi_out_of_range(backend: str) -> None:
    units, phi = torch.zeros(2, 3), torch.tensor([[0, 3, 1]])
    if backend == "cpu":
        for bad, got in ((phi, 3), (phi - 4, -4), (phi + 2**32, 2**32 + 3)):
            contract.check_error(
                lambda bad=bad: ops.route(units, bad), ValueError, rf"phi must be from 0 to 2 .*got {got}"
            )
        contract.check_error(
            lambda: torch.ops.fastforest.routing_route(units, phi, None, 1.0, False),
            RuntimeError,
            "phi must be between 0 and 2",
        )
        return
    with contract.on(backend) as device:
        units = units.to(device).requires_grad_()
        for bad in (phi.to(device), (phi + torch.tensor([0, 2**32, 0])).to(device)):
            p = op("routing_route")(units, bad, None, 1.0, False)
            assert p[:, 0, :2].isnan().all() and p[:, 0, 2:].eq(0.25).all()
            (grad,) = torch.autograd.grad(p.sum(), units)
            assert grad[:, 0].isnan().all() and grad[:, 1:].isfinite().all()


def test_values_wide(backend: str) -> None:
    """More units than shared memory holds, and more than a vector's remainder."""
    with contract.on(backend) as device:
        for units in (1601, 13001):
            case = Case("wide", forest(3, units, 2, 3), {}, UNITS)
            given = contract.tensors(case, torch.float32, device)
            got, grads = contract.with_gradients(ops.route, case, given)
            expected, expected_grads = contract.with_gradients(reference.route, case, given)
            assert contract.error(got[0], expected[0]) <= 1e-5
            assert contract.error(grads["units"], expected_grads["units"]) <= 1e-5


def test_draw_phi() -> None:
    phi = ops.draw_phi(10, 4, 5, seed=7)
    assert phi.shape == (4, 31) and phi.dtype == torch.int64
    for tree in phi:
        counts = tree.bincount(minlength=10)
        assert counts.min() >= 3 and counts.max() <= 4
    assert torch.equal(phi, ops.draw_phi(10, 4, 5, seed=7))
    assert not torch.equal(phi, ops.draw_phi(10, 4, 5, seed=8))
    assert not torch.equal(phi[0], phi[1])


U, PHI = torch.zeros(2, 3), torch.zeros(1, 3, dtype=torch.int64)
ERRORS = [
    (lambda: ops.route([1.0], PHI), TypeError, r"route: units must be a tensor \[N, F\], got list"),
    (lambda: ops.route(U[0], PHI), ValueError, r"route: units must be \[N, F\], got \[3\]"),
    (lambda: ops.route(U.int(), PHI), TypeError, "route: units must be float32.*got int32"),
    (lambda: ops.route(U, 3), TypeError, r"route: phi must be a tensor \[T, 2\^D - 1\], got int"),
    (lambda: ops.route(U, PHI.float()), TypeError, "route: phi must be int64 or int32, got float32"),
    (lambda: ops.route(U, PHI[0]), ValueError, r"phi must be \[T, 2\^D - 1\] with a depth D from 1 to 16, got \[3\]"),
    (lambda: ops.route(U, PHI[:, :2]), ValueError, r"with a depth D from 1 to 16, got \[1, 2\]"),
    (lambda: ops.route(U, PHI[:, :0]), ValueError, r"with a depth D from 1 to 16, got \[1, 0\]"),
    (lambda: ops.route(U, PHI[:, :1].expand(1, 2**17 - 1)), ValueError, r"from 1 to 16, got \[1, 131071\]"),
    (lambda: ops.route(U, PHI.to("meta")), ValueError, "route: phi's device must be cpu .*got meta"),
    (lambda: ops.route(U, PHI, 0), ValueError, "route: steepness must be above 0, got 0"),
    (lambda: ops.route(U, PHI, math.inf), ValueError, "route: steepness must be finite, got inf"),
    (lambda: ops.route(U, PHI, "x"), TypeError, "route: steepness must be a number, got str"),
    (lambda: ops.route(U, PHI, torch.ones(2)), ValueError, r"steepness must be .*one element, got \[2\]"),
    (lambda: ops.route(U, PHI, torch.tensor(1)), TypeError, "steepness must be a number or a floating.*got int64"),
    (lambda: ops.route(U, PHI, torch.ones((), device="meta")), ValueError, "steepness's device must be cpu.*got meta"),
    (lambda: ops.draw_phi(1.0, 1, 1), TypeError, "draw_phi: units must be an int, got float"),
    (lambda: ops.draw_phi(0, 1, 1), ValueError, "draw_phi: units must be at least 1, got 0"),
    (lambda: ops.draw_phi(1, 1, 17), ValueError, "draw_phi: depth must be at most 16, got 17"),
    (
        lambda: torch.ops.fastforest.routing_route(U[0], PHI, None, 1.0, False),
        RuntimeError,
        r"route: units must be \[N, F\], got \[3\]",
    ),
]  # fmt: skip


@pytest.mark.parametrize("call, kind, pattern", ERRORS, ids=lambda v: v if isinstance(v, str) else "")
def test_errors(call, kind: type[Exception], pattern: str) -> None:
    contract.check_error(call, kind, pattern)


def test_twice_differentiated_is_refused() -> None:
    units = torch.rand(2, 3, requires_grad=True)
    (grad,) = torch.autograd.grad(ops.route(units, PHI).square().sum(), units, create_graph=True)
    contract.check_error(lambda: grad.sum().backward(), RuntimeError, "routing_route cannot be differentiated twice")
