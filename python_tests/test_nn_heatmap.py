"""Layers of the room `heatmap`."""

from __future__ import annotations

import pytest
import torch

import fastforest as ff
from fastforest import coordinates


def test_soft_argmax_2d() -> None:
    z = torch.rand(2, 3, 8, 9)
    layer = ff.nn.SoftArgmax2d(7.0, window=2, debias=True)
    assert torch.equal(layer(z), ff.soft_argmax(z, 7.0, window=2, debias=True))
    assert not list(layer.parameters()) and not layer.state_dict()
    assert repr(layer) == "SoftArgmax2d(beta=7, window=2, debias=True, learnable=False)"


def test_learnable_beta() -> None:
    z = torch.rand(2, 3, 8, 9)
    layer = ff.nn.SoftArgmax2d(7.0, learnable=True)
    layer(z).square().sum().backward()
    assert layer.beta.grad.abs() > 0
    other = ff.nn.SoftArgmax2d(1.0, learnable=True)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(z), layer(z))
    assert repr(layer) == "SoftArgmax2d(beta=7, window=None, debias=False, learnable=True)"
    assert torch.equal(torch.compile(layer, fullgraph=True)(z), layer(z))


@pytest.mark.parametrize("udp", [True, False])
def test_peak_decoder(udp: bool) -> None:
    z = ff.render_gaussian(torch.tensor([[[20.3, 30.6], [9.1, 12.2]]]), 2.0, (48, 64))
    plain = ff.peak(z, "dark", kernel=9)
    assert all(torch.equal(a, b) for a, b in zip(ff.nn.PeakDecoder("dark", kernel=9)(z), plain, strict=True))
    points, score = ff.nn.PeakDecoder("dark", kernel=9, input_size=(192, 256), udp=udp)(z)
    assert torch.equal(points, coordinates.heatmap_to_input(plain.points, (48, 64), (192, 256), udp=udp))
    assert torch.equal(score, plain.score)
    decoder = ff.nn.PeakDecoder("local", input_size=(192, 256))
    assert repr(decoder) == "PeakDecoder(refine='local', kernel=11, input_size=(192, 256), udp=True)"
    (grad,) = torch.autograd.grad(decoder(z.requires_grad_()).points.sum(), z)
    assert grad.abs().sum() > 0


@pytest.mark.parametrize(
    "call, kind, pattern",
    [
        (lambda: ff.nn.SoftArgmax2d("x"), TypeError, "SoftArgmax2d: beta must be a number, got str"),
        (lambda: ff.nn.SoftArgmax2d(window=-1), ValueError, "SoftArgmax2d: window must be at least 0, got -1"),
        (lambda: ff.nn.PeakDecoder("sharp"), ValueError, "PeakDecoder: refine must be one of.*got 'sharp'"),
        (lambda: ff.nn.PeakDecoder(kernel=2), ValueError, "PeakDecoder: kernel must be odd, from 1 to 63, got 2"),
        (lambda: ff.nn.PeakDecoder(input_size=(3,)), TypeError, r"PeakDecoder: size must be \(H, W\), got \(3,\)"),
    ],
    ids=["beta", "window", "refine", "kernel", "input_size"],
)
def test_errors(call, kind: type[Exception], pattern: str) -> None:
    with pytest.raises(kind, match=pattern):
        call()
