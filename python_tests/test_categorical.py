"""The categorical room: the contract on every backend, then what the leaf updates promise."""

from __future__ import annotations

import copy
import math

import contract
import pytest
import torch
from contract import Case, Operator

import fastforest as ff
from fastforest.reference import categorical as exact
from fastforest.reference.pool import project_simplex

OPERATORS = {
    "log_prob": Operator(ff.categorical_log_prob, exact.categorical_log_prob, ("weight",)),
    "kl_loss": Operator(ff.categorical_kl_loss, exact.categorical_kl_loss, ("weight", "target")),
    "l2_loss": Operator(ff.categorical_l2_loss, exact.categorical_l2_loss, ("weight", "target")),
    "statistics": Operator(ff.categorical_statistics, exact.categorical_statistics, ("weight", "target")),
    "least_squares": Operator(
        ff.least_squares_statistics, exact.least_squares_statistics, ("weight", "target"), fused=False
    ),
}
SIZES = {
    "ones": (1, 1, 1, (1,)),
    "odd": (53, 3, 7, (37,)),
    "real": (70, 2, 64, (100,)),
    "heatmap": (13, 2, 5, (17, 9)),
    "tiny": (3, 2, 4, (5,)),
    "many leaves": (9, 2, 131, (3,)),
}
LOSSES = ("kl_loss", "l2_loss")
DIFFERENTIABLE = ("log_prob", *LOSSES)
ROWS = ("log_prob", *LOSSES)


def sample_of(samples, trees, leaves, trailing, dtype=torch.float64, seed=0):
    """weight [N, T, L], leaves [T, L, *C] and target [N, *C], all of them distributions."""
    generator = torch.Generator().manual_seed(seed)

    def softmax(*shape):
        flat = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return torch.softmax(2 * flat, -1)

    classes = math.prod(trailing)
    weight, leaves_ = softmax(samples, trees, leaves), softmax(trees, leaves, classes)
    target = softmax(samples, classes)
    return (
        weight.to(dtype),
        leaves_.view(trees, leaves, *trailing).to(dtype),
        target.view(samples, *trailing).to(dtype),
    )


def case_of(operator: str, size: str, forest: bool = False, **options) -> Case:
    def inputs(generator: torch.Generator) -> dict[str, torch.Tensor]:
        seed = int(torch.randint(1 << 30, (1,), generator=generator))
        weight, leaves, target = sample_of(*SIZES[size], seed=seed)
        made = {"weight": weight} if operator == "least_squares" else {"weight": weight, "leaves": leaves}
        return made if operator == "log_prob" else made | {"target": target}

    gradients = ("weight", "leaves") if operator in DIFFERENTIABLE else ()
    return Case(size, inputs, {"forest": forest, **options}, gradients)


every_operator = pytest.mark.parametrize("operator", OPERATORS)
either = pytest.mark.parametrize("forest", [False, True], ids=["trees", "forest"])


@every_operator
@either
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_contract_agreement(operator, forest, size, dtype, backend):
    contract.check_agreement(OPERATORS[operator], case_of(operator, size, forest), backend, dtype)


@pytest.mark.parametrize("operator", [*LOSSES, "statistics"])
@either
def test_contract_agreement_masked(operator, forest, backend):
    case = case_of(operator, "odd", forest, mask_threshold=0.01)
    contract.check_agreement(OPERATORS[operator], case, backend, torch.float64)


@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_contract_under_each_instruction_set(isa, rerun_under):
    rerun_under(isa, __file__, "(agreement or rows_apart or broken or floor) and not shim")


@pytest.mark.parametrize("operator", DIFFERENTIABLE)
@either
def test_contract_gradcheck(operator, forest, backend):
    contract.check_gradcheck(OPERATORS[operator], case_of(operator, "tiny", forest), backend)


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
@pytest.mark.parametrize("size", ["odd", "real"])
def test_contract_repeatable(operator, size, backend):
    contract.check_repeatable(OPERATORS[operator], case_of(operator, size), backend)


@pytest.mark.parametrize("operator", ROWS)
@either
def test_contract_rows_apart(operator, forest, backend):
    """A poisoned sample is NaN and changes no other, bit by bit; nor do leaves take a gradient from it."""
    case, op = case_of(operator, "odd", forest), OPERATORS[operator]
    with contract.on(backend) as device:
        given = contract.tensors(case, torch.float32, device)
        plain, plain_grads = contract.with_gradients(op.function, case, given)
        for name in op.batched:
            for value in (math.nan, math.inf, -math.inf):
                poisoned = copy.copy(given)
                poisoned[name] = given[name].clone()
                poisoned[name][2].view(-1)[-1] = value
                got, grads = contract.with_gradients(op.function, case, poisoned)
                others = torch.arange(len(got[0]), device=device) != 2
                assert torch.equal(got[0][others], plain[0][others])
                assert torch.equal(grads["weight"][others], plain_grads["weight"][others])
                assert got[0][2].view(1 if forest else 3, -1)[-1].isnan().all()
                assert grads["leaves"].isfinite().all()


@every_operator
@either
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_contract_soiled_memory(operator, forest, size, dtype, backend):
    contract.check_soiled_memory(OPERATORS[operator], case_of(operator, size, forest), backend, dtype)


@every_operator
@either
def test_contract_empty(operator, forest, backend):
    case, op = case_of(operator, "odd", forest), OPERATORS[operator]
    with contract.on(backend) as device:
        full = contract.outputs(op.function(**contract.tensors(case, torch.float32, device), **case.options))
        given = contract.tensors(case, torch.float32, device)
        given |= {k: given[k][:0] for k in op.batched}
        got, grads = contract.with_gradients(op.function, case, given)
        for o, f in zip(got, full, strict=True):
            if operator in ROWS:
                assert list(o.shape) == [0, *f.shape[1:]]
            else:
                assert o.shape == f.shape and bool((o == 0).all())
        for k, grad in grads.items():
            assert grad.shape == given[k].shape and bool((grad == 0).all())


@pytest.mark.parametrize("operator", [*DIFFERENTIABLE, "statistics"])
def test_contract_compile(operator):
    contract.check_compile(OPERATORS[operator], case_of(operator, "odd"))


def test_contract_opcheck():
    weight, leaves, target = sample_of(5, 2, 4, (9,), torch.float32)
    ops, options = torch.ops.fastforest, (0.5, 1e-12, 0.01)
    contract.check_opcheck(ops.categorical_statistics, weight, leaves, target, *options)
    contract.check_opcheck(ops.categorical_statistics_, weight, leaves, target, *options, torch.zeros_like(leaves))
    grad = torch.rand(5, 2, 9)
    contract.check_opcheck(ops.categorical_log_prob_backward, grad, weight, leaves, 1.0, 1e-12, True, True)
    for kind in (0, 1):
        rest = (kind, *options)
        contract.check_opcheck(ops.categorical_loss_backward_leaves, torch.rand(5, 2), weight, leaves, target, *rest)
        contract.check_opcheck(
            ops.categorical_loss, weight.clone().requires_grad_(), leaves.clone().requires_grad_(), target, *rest, True
        )
    contract.check_opcheck(
        ops.categorical_log_prob, weight.clone().requires_grad_(), leaves.clone().requires_grad_(), 1.0, 1e-12
    )


W, Q, Y = torch.rand(3, 2, 4), torch.rand(2, 4, 5), torch.rand(3, 5)
G, X = torch.eye(4).expand(2, 4, 4), torch.rand(2, 4, 5)
ERRORS = [
    (lambda: ff.categorical_log_prob(1.0, Q), TypeError, r"categorical_log_prob: weight must be a tensor \[N, T, L\]"),
    (lambda: ff.categorical_log_prob(W.long(), Q), TypeError, "weight must be float32, .* got int64"),
    (lambda: ff.categorical_log_prob(W[0], Q), ValueError, r"weight must be \[N, T, L\], got \[2, 4\]"),
    (lambda: ff.categorical_log_prob(W, Q[:, :3]), ValueError, r"weight must be \[3, 2, 3\] .*got \[3, 2, 4\]"),
    (lambda: ff.categorical_log_prob(W, Q[0]), ValueError, r"leaves must be \[T, L, \*C\], got \[4, 5\]"),
    (lambda: ff.categorical_log_prob(W, Q[..., :0]), ValueError, r"leaves must not be empty, got \[2, 4, 0\]"),
    (lambda: ff.categorical_log_prob(W, Q.double()), ValueError, "leaves' dtype must be torch.float32"),
    (lambda: ff.categorical_log_prob(W, Q.to("meta")), ValueError, "leaves must be on cpu .* got meta"),
    (lambda: ff.categorical_log_prob(W, Q, eps=-1.0), ValueError, "eps must be at least 0, got -1"),
    (lambda: ff.categorical_kl_loss(W, Q, [1.0]), TypeError, "categorical_kl_loss: target must be a tensor .*got list"),
    (lambda: ff.categorical_kl_loss(W, Q, Y[0]), ValueError, r"target must be \[N, \*C\], got \[5\]"),
    (lambda: ff.categorical_kl_loss(W, Q, Y[:2]), ValueError, r"target must be \[3, 5\] .*got \[2, 5\]"),
    (lambda: ff.categorical_kl_loss(W, Q, Y.double()), ValueError, "target's dtype must be torch.float32"),
    (
        lambda: ff.categorical_kl_loss(W, Q, Y.clone().requires_grad_()),
        ValueError,
        "target must not require a gradient",
    ),
    (
        lambda: ff.categorical_l2_loss(W, Q, Y, mask_threshold="a"),
        TypeError,
        "mask_threshold must be a number, got str",
    ),
    (lambda: ff.categorical_statistics(W, Q, Y, out=Q[:1]), ValueError, r"out must be \[2, 4, 5\] .*got \[1, 4, 5\]"),
    (lambda: ff.categorical_statistics(W, Q, Y, out=Q.double()), ValueError, "out's dtype must be torch.float32"),
    (lambda: ff.categorical_statistics(W, Q, Y, out=1), TypeError, "out must be a tensor, got int"),
    (
        lambda: ff.categorical_statistics(W, Q, Y, out=torch.rand(2, 5, 4).mT),
        ValueError,
        "out must be contiguous",
    ),
    (lambda: ff.categorical_update(Q[:1], Q), ValueError, r"statistics must be \[2, 4, 5\]"),
    (lambda: ff.least_squares_statistics(W, Y[:2]), ValueError, r"least_squares_statistics: target must be \[3, 5\]"),
    (lambda: ff.least_squares_update(1, X), TypeError, "gram must be a floating tensor, got int"),
    (lambda: ff.least_squares_update(G[:, :3], X), ValueError, r"gram must be \[2, 4, 4\] .*got \[2, 3, 4\]"),
    (lambda: ff.least_squares_update(G[0, 0], X), ValueError, r"gram and cross must be \[T, L, L\]"),
    (lambda: ff.least_squares_update(G * math.nan, X), ValueError, "gram and cross must be finite"),
    (lambda: ff.least_squares_update(G, X, ridge=-1.0), ValueError, "ridge must be at least 0, got -1"),
]


@pytest.mark.parametrize(("call", "kind", "pattern"), ERRORS, ids=[pattern[:40] for _, _, pattern in ERRORS])
def test_contract_errors(call, kind, pattern):
    contract.check_error(call, kind, pattern)


def test_kl_equals_torch_kl_div():
    weight, leaves, target = sample_of(20, 3, 8, (11,))
    log_prob = ff.categorical_log_prob(weight, leaves)
    dense = torch.nn.functional.kl_div(log_prob, target.unsqueeze(1), reduction="none").sum(-1)
    torch.testing.assert_close(ff.categorical_kl_loss(weight, leaves, target), dense)


@either
def test_bounding_never_increases_the_loss(forest):
    weight, leaves, target = sample_of(60, 3, 8, (12,))
    last = ff.categorical_kl_loss(weight, leaves, target, forest=forest).sum()
    first = last
    for _ in range(200):
        statistics = ff.categorical_statistics(weight, leaves, target, forest=forest)
        leaves, dead = ff.categorical_update(statistics, leaves)
        loss = ff.categorical_kl_loss(weight, leaves, target, forest=forest).sum()
        assert dead == 0 and loss <= last + 1e-12 * abs(last)
        last = loss
    assert last < 0.9 * first
    torch.testing.assert_close(leaves.sum(-1), torch.ones(3, 8, dtype=torch.float64))


@either
def test_statistics_are_additive(forest, backend):
    with contract.on(backend) as device:
        weight, leaves, target = (t.to(device) for t in sample_of(150, 2, 9, (5, 7)))
        whole = ff.categorical_statistics(weight, leaves, target, forest=forest)
        out = torch.zeros_like(leaves)
        for rows in (slice(0, 70), slice(70, 150)):
            part = ff.categorical_statistics(weight[rows], leaves, target[rows], forest=forest, out=out)
            assert part is out
        torch.testing.assert_close(out, whole)
    grams = [ff.least_squares_statistics(weight[r], target[r], forest=forest) for r in (slice(0, 70), slice(70, 150))]
    together = ff.least_squares_statistics(weight, target, forest=forest)
    for a, b, c in zip(*grams, together, strict=True):
        torch.testing.assert_close(a + b, c)


def test_a_broken_sample_adds_nothing(backend):
    with contract.on(backend) as device:
        weight, leaves, target = (t.to(device) for t in sample_of(100, 3, 7, (37,), torch.float32))
        keep = torch.arange(100, device=device) != 50
        expected = ff.categorical_statistics(weight, leaves, target, out=torch.zeros_like(leaves))
        without = weight.clone()
        without[50] = 0
        expected = ff.categorical_statistics(without, leaves, target)
        for value in (math.nan, math.inf):
            bad = target.clone()
            bad[50, 30] = value
            assert torch.equal(ff.categorical_statistics(weight, leaves, bad), expected)
            for a, b in zip(
                ff.least_squares_statistics(weight, bad),
                ff.least_squares_statistics(weight[keep], target[keep]),
                strict=True,
            ):
                torch.testing.assert_close(a, b)
            odd = weight.clone()
            odd[50, :, 3] = value
            assert torch.equal(ff.categorical_statistics(odd, leaves, target), expected)


def test_the_floor_holds_and_hides_the_gradient(backend):
    with contract.on(backend) as device:
        weight = torch.tensor([[[1.0, 0.0]]], device=device, requires_grad=True)
        leaves = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]], device=device, requires_grad=True)
        target = torch.tensor([[0.5, 0.5]], device=device)
        for eps in (0.0, 1e-6):
            floor = max(eps, torch.finfo(torch.float32).tiny)
            loss = ff.categorical_kl_loss(weight, leaves, target, eps=eps)
            torch.testing.assert_close(loss.item(), math.log(0.5) - 0.5 * math.log(floor))
            grads = torch.autograd.grad(loss.sum(), (weight, leaves))
            assert grads[0].tolist() == [[[-0.5, 0.0]]] and grads[1].tolist() == [[[-0.5, 0.0], [0.0, 0.0]]]
            assert ff.categorical_statistics(weight, leaves, target, eps=eps).tolist() == [[[0.5, 0.0], [0.0, 0.0]]]


def test_zero_targets_cost_nothing():
    weight, leaves, _ = sample_of(4, 2, 3, (5,))
    target = torch.eye(5, dtype=torch.float64)[:4]
    loss = ff.categorical_kl_loss(weight, leaves, target)
    torch.testing.assert_close(loss, -ff.categorical_log_prob(weight, leaves)[torch.arange(4), :, torch.arange(4)])


def test_a_mask_leaves_classes_out():
    weight, leaves, target = sample_of(6, 2, 3, (8,))
    target[:, 3:] = 0
    for loss in (ff.categorical_kl_loss, ff.categorical_l2_loss):
        masked = loss(weight, leaves, target, mask_threshold=0.0)
        torch.testing.assert_close(masked, loss(weight, leaves[..., :3], target[:, :3]))


def test_dead_leaves_are_counted_and_kept():
    weight, leaves, target = sample_of(20, 2, 4, (6,))
    weight[:, 1, 2] = 0
    fresh, dead = ff.categorical_update(ff.categorical_statistics(weight, leaves, target), leaves)
    assert dead == 1 and torch.equal(fresh[1, 2], leaves[1, 2])
    torch.testing.assert_close(fresh.sum(-1), torch.ones(2, 4, dtype=torch.float64))
    torch.testing.assert_close(
        (fresh, dead), exact.categorical_update(exact.categorical_statistics(weight, leaves, target), leaves)
    )


@either
def test_least_squares_solves_and_projects(forest):
    weight, leaves, target = sample_of(40, 2, 5, (3, 4))
    gram, cross = ff.least_squares_statistics(weight, target, forest=forest)
    loose, dead = ff.least_squares_update(gram, cross, ridge=0.0, simplex=False)
    assert dead == 0
    before = ff.categorical_l2_loss(weight, leaves, target, forest=forest).sum()
    assert ff.categorical_l2_loss(weight, loose.view_as(leaves), target, forest=forest).sum() < before
    expected, _ = exact.least_squares_update(gram, cross, ridge=0.0, simplex=False)
    torch.testing.assert_close(loose, expected, atol=1e-8, rtol=1e-6)
    tight, _ = ff.least_squares_update(gram, cross, ridge=1e-9)
    assert bool((tight >= 0).all())
    flat = tight.reshape(10, 12)
    torch.testing.assert_close(flat.sum(-1), torch.ones(10, dtype=torch.float64))
    solved, _ = ff.least_squares_update(gram, cross, ridge=1e-9, simplex=False)
    torch.testing.assert_close(flat, project_simplex(solved.reshape(10, 12)))


def test_a_singular_gram_gives_the_minimum_norm_leaves():
    weight, _, target = sample_of(40, 2, 6, (7,))
    weight[:, 0, 4] = 0  # never reached
    weight[:, 1, 2] = weight[:, 1, 3]  # always alike
    gram, cross = ff.least_squares_statistics(weight, target)
    solution, dead = ff.least_squares_update(gram, cross, ridge=0.0, simplex=False)
    assert dead == 1 and solution[0, 4].abs().max() < 1e-9
    torch.testing.assert_close(solution[1, 2], solution[1, 3])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_computed_in_float32(dtype):
    weight, leaves, target = sample_of(9, 2, 4, (5,), dtype)
    loss = ff.categorical_kl_loss(weight.requires_grad_(), leaves, target)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, ff.categorical_kl_loss(weight.float(), leaves.float(), target.float()))
    assert torch.autograd.grad(loss.sum(), weight)[0].dtype == dtype


def test_second_derivatives_are_refused():
    weight, leaves, target = sample_of(4, 2, 3, (5,))
    weight.requires_grad_()
    for call, name in (
        (lambda: ff.categorical_kl_loss(weight, leaves, target), "categorical_loss"),
        (lambda: ff.categorical_log_prob(weight, leaves), "categorical_log_prob"),
    ):
        (grad,) = torch.autograd.grad(call().sum(), weight, create_graph=True)
        with pytest.raises(RuntimeError, match=f"{name} cannot be differentiated twice"):
            torch.autograd.grad(grad.sum(), weight)


def test_heatmap_leaves_need_no_memory_of_samples_by_classes():
    """256 samples, 3 trees, 128 x 128: [N, T, C] is 50 MB; no allocation comes near (the leaves, padded, are 3 MB)."""
    weight, leaves, target = sample_of(256, 3, 4, (128, 128), torch.float32)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(profile_memory=True, activities=activities) as seen:
        ff.categorical_statistics(weight, leaves, target)
        ff.categorical_kl_loss(weight.requires_grad_(), leaves, target).sum().backward()
    largest = max((event.cpu_memory_usage for event in seen.events()), default=0)
    assert 0 < largest < 256 * 3 * 128 * 128 * 4 / 10
