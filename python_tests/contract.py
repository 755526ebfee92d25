"""What every operator of every room must keep, on every backend.

A room describes an operator once, as an `Operator` (its public function and its reference) and a list of `Case`s, and
parametrises one test over both and over the fixture `backend`. A check that a backend cannot run is not run there;
nothing is retried, and no tolerance is wider than the tables below without a sentence beside it.
"""

from __future__ import annotations

import copy
import ctypes
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from fastforest.ops import _register

# Largest error against the float64 reference, over the largest magnitude of the expected tensor.
RELATIVE = {torch.float32: 1e-5, torch.float64: 1e-12}
# Low precision: at most this many times the error of the reference run in that precision, PyTorch's own, and never held
# below the rounding of the output itself.
LOW_FACTOR = 2.0
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Case:
    """One call. ``inputs`` makes the tensors in float64 (called with a seeded generator), ``options`` are the rest."""

    id: str
    inputs: Callable[[torch.Generator], dict[str, Tensor]]
    options: Mapping[str, Any] = field(default_factory=dict)
    differentiable: tuple[str, ...] = ()  # names of the inputs that get gradients


@dataclass(frozen=True)
class Operator:
    """``function`` and ``reference`` take the inputs and options by keyword; outputs are a tensor or a tuple of them."""

    function: Callable[..., Any]
    reference: Callable[..., Any]
    batched: tuple[str, ...]  # the inputs with a batch dimension, over which vmap goes
    fused: bool = True  # False: partly PyTorch's own matmuls, which sum in another order when batched or compiled
    scale: Mapping[str, float] = field(default_factory=dict)  # least magnitude an input's gradient is compared with


def cases(*given: Case) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", given, ids=[c.id for c in given])


@contextmanager
def on(backend: str) -> Iterator[str]:
    """The device to put tensors on, with the operators of ``backend`` switched on."""
    with _register.backend("shim" if backend == "shim" else "main"):
        yield "cuda" if backend == "cuda" else "cpu"


def tensors(case: Case, dtype: torch.dtype = torch.float64, device: str = "cpu", seed: int = 0) -> dict[str, Tensor]:
    """Values that ``dtype`` holds exactly, so that the reference sees the operator's very inputs."""
    made = case.inputs(torch.Generator().manual_seed(seed))
    return {k: v.to(dtype).to(device) if v.is_floating_point() else v.to(device) for k, v in made.items()}


def outputs(result: Any) -> tuple[Tensor, ...]:
    return tuple(result) if isinstance(result, tuple) else (result,)


def with_gradients(
    function: Callable[..., Any], case: Case, given: Mapping[str, Tensor]
) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """Outputs, and gradients of a fixed weighted sum of them."""
    leaves = {k: v.detach().clone().requires_grad_() if k in case.differentiable else v for k, v in given.items()}
    for k in case.differentiable:  # clone() may straighten strides, which are part of the case
        leaves[k] = given[k].detach().requires_grad_()
    out = outputs(function(**leaves, **case.options))
    if not case.differentiable:
        return tuple(o.detach() for o in out), {}
    total = torch.zeros((), dtype=torch.float64, device=out[0].device)
    for i, o in enumerate(out):
        weight = torch.randn(o.shape, generator=torch.Generator().manual_seed(i + 1), dtype=torch.float64)
        total = total + (o.double() * weight.to(o.dtype).double().to(o.device)).sum()
    grads = torch.autograd.grad(total, [leaves[k] for k in case.differentiable])
    return tuple(o.detach() for o in out), dict(zip(case.differentiable, grads, strict=True))


def soil_memory() -> None:
    """Leaves NaN in what the allocator hands out next: what a kernel reads before it writes it then shows."""
    libc = ctypes.CDLL(None)
    libc.malloc.argtypes, libc.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
    libc.free.argtypes = [ctypes.c_void_p]
    # Small ones come from lists by size; larger ones are cut from the long ones here, which the last keeps in the heap.
    sizes = [size for size in range(24, 1100, 16) for _ in range(8)] + [1 << 14] * 256
    blocks = [libc.malloc(size) for size in sizes]
    libc.malloc(24)
    for block, size in zip(blocks, sizes, strict=True):
        ctypes.memset(block, 0xFF, size)
    for block in blocks:
        libc.free(block)


def error(got: Tensor, expected: Tensor, least: float = 0.0) -> float:
    """Largest difference over the largest magnitude of ``expected`` (or ``least``); inf unless NaNs stand alike."""
    assert got.shape == expected.shape, f"shape {list(got.shape)}, expected {list(expected.shape)}"
    got, expected = got.double().cpu(), expected.double().cpu()
    if got.numel() == 0:
        return 0.0
    odd = ~(got.isfinite() & expected.isfinite())
    if not torch.equal(got[odd].nan_to_num(nan=1.25), expected[odd].nan_to_num(nan=1.25)):
        return float("inf")
    difference = torch.where(odd, 0.0, got - expected).abs().max().item()
    magnitude = max(torch.where(odd, 0.0, expected).abs().max().item(), least)
    return difference / magnitude if magnitude > 0 else (0.0 if difference == 0 else float("inf"))


def check_soiled_memory(op: Operator, case: Case, backend: str, dtype: torch.dtype) -> None:
    """As `check_agreement` where the memory that the operator is given, and its neighbours, hold NaN."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # others have heaps of their own
    try:
        for _ in range(3):
            soil_memory()
            if dtype in RELATIVE:
                check_agreement(op, case, backend, dtype)
                continue
            with on(backend) as device:
                given = tensors(case, dtype, device)
                got, grads = with_gradients(op.function, case, given)
            exact = {k: v.double() if v.is_floating_point() else v for k, v in given.items()}
            expected, expected_grads = with_gradients(op.reference, case, exact)
            for g, e in zip((*got, *grads.values()), (*expected, *expected_grads.values()), strict=True):
                assert torch.equal(g.isfinite().cpu(), e.isfinite().cpu()), "reads memory that nothing wrote"
    finally:
        torch.set_num_threads(threads)


def check_agreement(op: Operator, case: Case, backend: str, dtype: torch.dtype) -> None:
    """Forward and gradients against the float64 reference; dtypes of what comes back."""
    with on(backend) as device:
        given = tensors(case, dtype, device)
        got, grads = with_gradients(op.function, case, given)
    exact = {k: v.double() if v.is_floating_point() else v for k, v in given.items()}
    expected, expected_grads = with_gradients(op.reference, case, exact)
    if dtype in RELATIVE:
        limits = [RELATIVE[dtype]] * len(expected)
        grad_limits = dict.fromkeys(expected_grads, RELATIVE[dtype])
    else:
        eager, eager_grads = with_gradients(op.reference, case, given)
        limits = [LOW_FACTOR * max(error(e, x), ROUNDING[dtype]) for e, x in zip(eager, expected, strict=True)]
        grad_limits = {
            k: LOW_FACTOR * max(error(eager_grads[k], x, op.scale.get(k, 0.0)), ROUNDING[dtype])
            for k, x in expected_grads.items()
        }
    for i, (g, e) in enumerate(zip(got, expected, strict=True)):
        assert error(g, e) <= limits[i], f"output {i}: error {error(g, e):.2e} above {limits[i]:.2e}"
    for k, e in expected_grads.items():
        assert grads[k].dtype == given[k].dtype, f"gradient of {k} is {grads[k].dtype}"
        worst = error(grads[k], e, op.scale.get(k, 0.0))
        assert worst <= grad_limits[k], f"gradient of {k}: error {worst:.2e} above {grad_limits[k]:.2e}"


def check_gradcheck(op: Operator, case: Case, backend: str) -> None:
    with on(backend) as device:
        given = tensors(case, torch.float64, device)
        leaves = [given[k].requires_grad_() for k in case.differentiable]
        rest = {k: v for k, v in given.items() if k not in case.differentiable}

        def call(*values: Tensor) -> Any:
            return op.function(**dict(zip(case.differentiable, values, strict=True)), **rest, **case.options)

        # Every launch of the shim starts hundreds of fibers: there, gradcheck projects on random directions.
        assert torch.autograd.gradcheck(call, leaves, nondet_tol=0.0, fast_mode=backend == "shim")


def check_strides(op: Operator, case: Case, backend: str, dtype: torch.dtype = torch.float32) -> None:
    """Non-contiguous, misaligned and expanded inputs give what contiguous ones give."""
    with on(backend) as device:
        given = tensors(case, dtype, device)
        plain, plain_grads = with_gradients(op.function, case, given)
        for name, layout in LAYOUTS.items():
            odd = {k: layout(v) for k, v in given.items()}
            got, grads = with_gradients(op.function, case, odd)
            limit = 10 * ROUNDING.get(dtype, 1e-6)  # another order of summation
            for a, b in [*zip(got, plain, strict=True), *((grads[k], plain_grads[k]) for k in grads)]:
                assert error(a, b, 1e-3) <= limit, f"{name}: {error(a, b, 1e-3):.2e}"


def _misaligned(t: Tensor) -> Tensor:
    """A contiguous tensor one element past an aligned address."""
    return torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)


def _sliced(t: Tensor) -> Tensor:
    """Every dimension cut out of a larger one."""
    if t.dim() == 0:
        return t
    big = t.new_full([n + 3 for n in t.shape], float("nan") if t.is_floating_point() else 0)
    where = tuple(slice(1, n + 1) for n in t.shape)
    big[where] = t
    return big[where]


def _second_innermost(t: Tensor) -> Tensor:
    """Dimension 1 innermost: channels_last for four dimensions."""
    return t.movedim(1, -1).contiguous().movedim(-1, 1) if t.dim() > 2 else t


def _reversed_order(t: Tensor) -> Tensor:
    """The first dimension innermost."""
    order = tuple(reversed(range(t.dim())))
    return t.permute(order).contiguous().permute(order)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "misaligned": _misaligned,
    "sliced": _sliced,
    "second dimension innermost": _second_innermost,
    "reversed strides": _reversed_order,
}


def check_opcheck(operator: Any, *arguments: Any) -> None:
    """`torch.library.opcheck`: schema, fake kernel, autograd registration, AOT dispatch with dynamic shapes."""
    torch.library.opcheck(operator, arguments)


def check_compile(op: Operator, case: Case) -> None:
    """`torch.compile(fullgraph=True)` gives the eager result, bit by bit where the operator is fused."""
    given = tensors(case, torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(op.function, fullgraph=True)
    got, grads = with_gradients(compiled, case, given)
    plain, plain_grads = with_gradients(op.function, case, given)
    for a, b in zip(got, plain, strict=True):
        assert torch.equal(a, b) if op.fused else error(a, b) <= RELATIVE[torch.float32]
    for k in grads:  # that of an input without a batch dimension is summed by PyTorch, in the compiler's order
        exact = op.fused and k in op.batched
        assert torch.equal(grads[k], plain_grads[k]) if exact else error(grads[k], plain_grads[k]) <= 1e-5, k


def check_vmap(op: Operator, case: Case, backend: str) -> None:
    """`torch.vmap` over stacked inputs gives the loop's result, and so does its gradient."""
    with on(backend) as device:
        rows = [tensors(case, torch.float32, device, seed) for seed in range(3)]
        stacked = {k: torch.stack([r[k] for r in rows]) for k in rows[0]}
        for k in case.differentiable:
            stacked[k].requires_grad_()
        dims = {k: 0 if k in op.batched else None for k in stacked}
        shared = {
            k: v if dims[k] == 0 else rows[0][k].requires_grad_(k in case.differentiable) for k, v in stacked.items()
        }
        names = list(shared)
        call = torch.vmap(
            lambda *v: op.function(**dict(zip(names, v, strict=True)), **case.options),
            in_dims=tuple(dims[k] for k in names),
        )
        got = outputs(call(*shared.values()))
        loop = [
            outputs(op.function(**{k: v[i] if dims[k] == 0 else v for k, v in shared.items()}, **case.options))
            for i in range(3)
        ]
        expected = tuple(torch.stack(column) for column in zip(*loop, strict=True))
        for a, b in zip(got, expected, strict=True):
            assert torch.equal(a, b) if op.fused else error(a, b) <= RELATIVE[torch.float32]
        if case.differentiable:
            leaves = [shared[k] for k in case.differentiable]
            ours = torch.autograd.grad(sum(o.square().sum() for o in got), leaves)
            theirs = torch.autograd.grad(sum(o.square().sum() for o in expected), leaves)
            for a, b in zip(ours, theirs, strict=True):
                assert error(a, b, 1e-3) <= 1e-5


def check_autocast(op: Operator, case: Case, backend: str, same: bool) -> None:
    """Under autocast: as without it (``same``), or as with float32 inputs."""
    with on(backend) as device:
        given = tensors(case, torch.bfloat16, device)
        with torch.autocast(device, torch.bfloat16):
            got = outputs(op.function(**given, **case.options))
        plain = given if same else {k: v.float() if v.is_floating_point() else v for k, v in given.items()}
        for a, b in zip(got, outputs(op.function(**plain, **case.options)), strict=True):
            assert a.dtype == b.dtype
            assert torch.equal(a, b)


def check_repeatable(op: Operator, case: Case, backend: str) -> None:
    """The same bits again; on the CPU with any number of threads, on CUDA on another stream and from a graph."""
    with on(backend) as device:
        given = tensors(case, torch.float32, device)
        first, first_grads = with_gradients(op.function, case, given)

        def same(out: Sequence[Tensor], grads: Mapping[str, Tensor]) -> None:
            for a, b in [*zip(out, first, strict=True), *((grads[k], first_grads[k]) for k in grads)]:
                assert torch.equal(a.nan_to_num(1.25), b.nan_to_num(1.25))

        same(*with_gradients(op.function, case, given))
        if backend == "cpu":
            threads = torch.get_num_threads()
            try:
                torch.set_num_threads(1)
                same(*with_gradients(op.function, case, given))
            finally:
                torch.set_num_threads(threads)
        if backend == "cuda":
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                out = with_gradients(op.function, case, given)
            torch.cuda.current_stream().wait_stream(stream)
            same(*out)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph), torch.no_grad():
                captured = outputs(op.function(**given, **case.options))
            graph.replay()
            torch.cuda.synchronize()
            same(captured, {})


def check_rows_apart(op: Operator, case: Case, backend: str, name: str, values: Sequence[float]) -> None:
    """A poisoned first row of input ``name`` changes no other row of any output or gradient: bit by bit."""
    with on(backend) as device:
        given = tensors(case, torch.float32, device)
        plain, plain_grads = with_gradients(op.function, case, given)
        for value in values:
            poisoned = copy.copy(given)
            poisoned[name] = given[name].clone()
            poisoned[name][0, 0].view(-1)[-1] = value
            got, grads = with_gradients(op.function, case, poisoned)
            pairs = [*zip(got, plain, strict=True), *((grads[k], plain_grads[k]) for k in grads if k in op.batched)]
            for a, b in pairs:
                assert torch.equal(a.flatten(0, 1)[1:], b.flatten(0, 1)[1:]), f"{value} in {name} reached another row"


def check_empty(op: Operator, case: Case, backend: str) -> None:
    """B = 0 and P = 0: empty outputs and gradients of the right shape."""
    with on(backend) as device:
        full = outputs(op.function(**tensors(case, torch.float32, device), **case.options))
        for dim in (0, 1):
            given = {
                k: v.narrow(dim, 0, 0) if k in op.batched else v
                for k, v in tensors(case, torch.float32, device).items()
            }
            got, grads = with_gradients(op.function, case, given)
            for o, f in zip(got, full, strict=True):
                assert list(o.shape) == [0 if d == dim else n for d, n in enumerate(f.shape)]
            for k in grads:
                assert grads[k].shape == given[k].shape


def check_error(call: Callable[[], Any], kind: type[Exception], pattern: str) -> None:
    with pytest.raises(kind, match=re.compile(pattern)):
        call()


def far_view(shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """A zeroed CPU tensor whose first stride passes 2^31 elements; the system maps only the pages that are touched."""
    inner = 1
    for n in shape[1:]:
        inner *= n
    stride = 2**31 + 64
    store = torch.empty((shape[0] - 1) * stride + inner, dtype=dtype)
    rest = [1] * (len(shape) - 1)
    for i in range(len(rest) - 2, -1, -1):
        rest[i] = rest[i + 1] * shape[i + 2]
    return store.as_strided(list(shape), [stride, *rest]).zero_()
