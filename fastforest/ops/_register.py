"""One call tells PyTorch all that it must know of an operator: fake kernel, autograd, vmap, autocast.

The kernels themselves are registered by the library ``_ops`` (namespace ``fastforest``). The host shim is a second
library with the same operators, whose CUDA kernels run on the CPU; tests load it and switch to it with `backend`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

_MAIN = "fastforest"
_SHIM = "fastforest_shim"


@dataclass(frozen=True)
class _Hooks:
    fake: Callable[..., Any]
    save: Callable[..., None] | None
    backward: Callable[..., Any] | None
    batch: Sequence[int] | None
    autocast: torch.dtype | None


_hooks: dict[str, _Hooks] = {}
_namespace = _MAIN


def op(name: str) -> Callable[..., Any]:
    """The operator of this name in the namespace at hand."""
    return getattr(getattr(torch.ops, _namespace), name)


def register(
    name: str,
    *,
    fake: Callable[..., Any],
    save: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
    batch: Sequence[int] | None = None,
    autocast: torch.dtype | None = None,
) -> None:
    """Registers the hooks of operator ``name``.

    fake: outputs of the right shape and dtype, no data.
    save, backward: as `torch.library.register_autograd`; without backward, differentiating raises in words.
    batch: positions of the arguments with a leading batch dimension that every output has too. `torch.vmap` over these
        alone folds into that dimension; over any other argument it loops. None: an operator that vmap refuses.
    autocast: the dtype that floating inputs are cast to under autocast.
    """
    _hooks[name] = _Hooks(fake, save, backward, batch, autocast)
    _install(_MAIN, name)


def _install(namespace: str, name: str) -> None:
    hooks, full = _hooks[name], f"{namespace}::{name}"
    torch.library.register_fake(full, hooks.fake)
    if name.endswith("_"):  # works in place: nothing to differentiate, batch or cast
        return
    if hooks.backward is not None:
        torch.library.register_autograd(full, hooks.backward, setup_context=hooks.save)
    else:
        torch.library.register_autograd(full, _refuse(name))
    if hooks.batch is not None:
        torch.library.register_vmap(full, _vmap_rule(name, tuple(hooks.batch)))
    if hooks.autocast is not None:
        for device in ("cpu", "cuda"):
            torch.library.register_autocast(full, device, hooks.autocast)


def _refuse(name: str) -> Callable[..., Any]:
    what = "differentiated twice" if name.endswith("_backward") else "differentiated"

    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(f"{name.removesuffix('_backward')} cannot be {what}")

    return backward


def _vmap_rule(name: str, foldable: tuple[int, ...]) -> Callable[..., Any]:
    def loop(size: int, in_dims: Sequence[int | None], args: Sequence[Any]) -> Any:
        rows = [
            op(name)(*(a if d is None else a.select(d, i) for a, d in zip(args, in_dims, strict=True)))
            for i in range(size)
        ]
        if isinstance(rows[0], tuple):
            return tuple(torch.stack(column) for column in zip(*rows, strict=True)), (0,) * len(rows[0])
        return torch.stack(rows), 0

    def fold(size: int, in_dims: Sequence[int | None], args: Sequence[Any]) -> Any:
        merged = list(args)
        for i in foldable:
            if args[i] is not None:
                a = args[i].expand(size, *args[i].shape) if in_dims[i] is None else args[i].movedim(in_dims[i], 0)
                merged[i] = a.flatten(0, 1)
        out = op(name)(*merged)
        if isinstance(out, tuple):
            return tuple(o.unflatten(0, (size, -1)) for o in out), (0,) * len(out)
        return out.unflatten(0, (size, -1)), 0

    def nothing(in_dims: Sequence[int | None], args: Sequence[Any]) -> Any:
        """A batch of size 0: the fake kernel knows the shapes of the rows that are not there."""
        one = [
            a if d is None else a.new_empty(a.shape[:d] + a.shape[d + 1 :]) for a, d in zip(args, in_dims, strict=True)
        ]
        out = _hooks[name].fake(*one)
        if isinstance(out, tuple):
            return tuple(o.new_empty((0, *o.shape)) for o in out), (0,) * len(out)
        return out.new_empty((0, *out.shape)), 0

    def rule(info: Any, in_dims: Sequence[int | None], *args: Any) -> Any:
        dims = [d if isinstance(d, int) else None for d in in_dims]
        if info.batch_size == 0:
            return nothing(dims, args)
        leading = [args[i].shape[1 if dims[i] == 0 else 0] for i in foldable if args[i] is not None]
        if 0 not in leading and all(d is None or i in foldable for i, d in enumerate(dims)):
            return fold(info.batch_size, dims, args)
        return loop(info.batch_size, dims, args)

    return rule


def load_shim(path: str | Path) -> None:
    """Loads the host shim and registers every operator's hooks for it. For tests."""
    torch.ops.load_library(str(path))
    for name in _hooks:
        _install(_SHIM, name)


@contextmanager
def backend(name: str) -> Iterator[None]:
    """``with backend("shim")``: the CUDA kernels, run on the CPU by the host shim. For tests."""
    global _namespace
    before, _namespace = _namespace, {"main": _MAIN, "shim": _SHIM}[name]
    try:
        yield
    finally:
        _namespace = before
