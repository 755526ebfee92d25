"""`fastforest.models` backbones: shapes, gradients, memory, precision, compilation; batch normalisation across ranks."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import norm_ranks
import pytest
import torch
from processes import on_two_ranks
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fastforest.models import BACKBONES, Features, Trunk, build_backbone, synchronize_batch_norm
from fastforest.models.norm import normalization

TINY: dict[str, dict[str, Any]] = {
    "small": {"width": 4, "code": 6},
    "hourglass": {"width": 8, "code": 6},
    "stacked": {"width": 8, "code": 6, "stacks": 2},
    "highres": {"width": 4, "code": 6, "channels": 10},
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


class Plain(nn.Module):
    def __init__(self, backbone: Trunk) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(self.backbone(images)[:2])


def tiny(name: str, size: int = 32, **changes: Any) -> Trunk:
    torch.manual_seed(0)
    return build_backbone(name, size, **TINY[name] | changes)


def awake(backbone: nn.Module) -> nn.Module:
    """With no branch that starts at 0."""
    for name, parameter in backbone.named_parameters():
        if name.endswith("norm.weight"):
            nn.init.ones_(parameter)
    return backbone


def total(found: Features) -> torch.Tensor:
    """A number that every output moves, each cell by another weight."""
    parts = [found.map, found.vector, *found.earlier]
    return sum((part.float() * torch.linspace(-1, 1, part.numel()).view_as(part)).sum() for part in parts)


@pytest.mark.parametrize(
    ("name", "size", "options", "channels", "features"),
    [
        ("small", 32, {"width": 3, "blocks": [0, 1, 0, 2], "code": 5}, 6, 5),
        ("small", 96, {"width": 2, "code": 1}, 4, 9),
        ("hourglass", 40, {"depth": 1, "width": 4, "code": 3}, 4, 75),
        ("hourglass", 96, {"width": 12, "code": 1}, 12, 9),
        ("stacked", 64, {"depth": 4, "width": 20, "code": 7, "stacks": 8}, 20, 7),
        ("stacked", 24, {"depth": 1, "width": 8, "stacks": 1}, 8, 1152),
        ("highres", 32, {"width": 3, "channels": 5, "code": 2}, 5, 2),
        ("highres", 96, {"width": 2, "modules": [2, 1, 3], "blocks": 2, "channels": 1, "code": 1}, 1, 9),
    ],
)
@pytest.mark.parametrize("norm", ["batch", "group"])
def test_outputs_have_the_shapes_announced(
    name: str, size: int, options: dict[str, Any], channels: int, features: int, norm: str
) -> None:
    backbone = build_backbone(name, size, **options, norm=norm)
    assert (backbone.image_size, backbone.stride) == (size, 4)
    assert (backbone.map_channels, backbone.features) == (channels, features)
    found = backbone(torch.rand(2, 3, size, size))
    maps, vector = found[:2]
    assert maps.shape == (2, channels, size // 4, size // 4) and vector.shape == (2, features)
    assert [entry.shape for entry in found.earlier] == [maps.shape] * (options.get("stacks", 1) - 1)
    assert all(entry.isfinite().all() for entry in (maps, vector, *found.earlier))


@pytest.mark.parametrize(
    ("name", "options", "millions", "billions"),
    [
        ("small", {}, "3.8", {96: "0.21", 256: "1.5"}),
        ("hourglass", {}, "0.7", {96: "0.19", 256: "1.3"}),
        ("stacked", {}, "1.3", {96: "0.30", 256: "2.1"}),
        ("stacked", {"stacks": 4, "depth": 4, "width": 256}, "12.8", {256: "14.6"}),
        ("stacked", {"stacks": 8, "depth": 4, "width": 256}, "25.3", {256: "27.2"}),
        ("highres", {}, "1.0", {96: "0.11", 256: "0.78"}),
        ("highres", {"width": 18, "modules": (1, 4, 3), "blocks": 4, "channels": 270}, "9.7", {96: "0.64", 256: "4.6"}),
    ],
)
def test_costs_are_those_documented(
    name: str, options: dict[str, Any], millions: str, billions: dict[int, str]
) -> None:
    for size, expected in billions.items():
        with torch.device("meta"):
            backbone, images = build_backbone(name, size, **options), torch.empty(1, 3, size, size)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            backbone.eval()(images)
        assert f"{counter.get_total_flops() / 2e9:.{len(expected.partition('.')[2])}f}" == expected
        assert f"{sum(parameter.numel() for parameter in backbone.parameters()) / 1e6:.1f}" == millions


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("norm", ["batch", "group"])
def test_a_gradient_reaches_every_parameter(name: str, norm: str) -> None:
    backbone = tiny(name, norm=norm)
    found = backbone(torch.rand(2, 3, 32, 32))
    (found.map.square().sum() + found.vector.square().sum()).backward()
    assert [key for key, parameter in backbone.named_parameters() if parameter.grad is None] == []
    backbone = awake(tiny(name, 64, norm=norm))
    total(backbone(torch.rand(2, 3, 64, 64))).backward()
    silent = [key for key, p in backbone.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert silent == []


@pytest.mark.parametrize("name", BACKBONES)
def test_the_vector_alone_passes_through_narrow(name: str) -> None:
    backbone = tiny(name)
    backbone(torch.rand(2, 3, 32, 32)).map.sum().backward()
    unused = {key for key, parameter in backbone.named_parameters() if parameter.grad is None}
    assert unused == {f"narrow.{key}" for key, _ in backbone.narrow.named_parameters()}


@pytest.mark.parametrize(("name", "saved"), [("small", 0.1), ("hourglass", 0.4), ("stacked", 0.25), ("highres", 0.0)])
def test_the_vector_alone_is_the_same_for_less(name: str, saved: float) -> None:
    """Its value, its gradients, its own running statistics; of the default backbone, the share of the work left out."""
    whole, alone, images = awake(tiny(name, 64)), awake(tiny(name, 64)), torch.rand(3, 3, 64, 64)
    expected, found = whole(images).vector, alone.vector(images)
    assert torch.equal(found, expected)
    expected.square().sum().backward()
    found.square().sum().backward()
    for (key, first), second in zip(whole.named_parameters(), alone.parameters(), strict=True):
        assert (first.grad is None) == (second.grad is None), key
        assert first.grad is None or torch.equal(first.grad, second.grad), key
    assert torch.equal(whole.narrow[1].running_mean, alone.narrow[1].running_mean)
    with torch.device("meta"):
        backbone, image = build_backbone(name, 96).eval(), torch.empty(1, 3, 96, 96)
    flops = []
    for run in (backbone, backbone.vector):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            run(image)
        flops.append(counter.get_total_flops())
    assert flops[1] <= (1 - saved) * flops[0]


@pytest.mark.parametrize("name", BACKBONES)
def test_the_vector_keeps_where_a_thing_is(name: str) -> None:
    """A change in one corner moves that quarter of the vector's cells the most."""
    backbone = awake(tiny(name, 128, norm="group")).eval()
    image = torch.rand(1, 3, 128, 128)
    changed = image.clone()
    changed[..., 96:, :32] = 0
    with torch.no_grad():
        moved = (backbone(changed).vector - backbone(image).vector).view(6, 2, 2, 2, 2).abs().sum((0, 2, 4))
    assert moved.argmax() == 2


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("norm", ["batch", "group"])
def test_two_images_are_learned_by_heart(name: str, norm: str) -> None:
    """Spots of two colours in noise; the head starts at 0, so that what falls is more than its own first guess."""
    backbone = tiny(name, 64, norm=norm, width=16)
    head = nn.Conv2d(backbone.map_channels, 2, 1)
    for parameter in head.parameters():
        nn.init.zeros_(parameter)
    axis = torch.arange(16.0)
    centres = torch.tensor([[[3.0, 4.0], [10.0, 12.0]], [[12.0, 3.0], [5.0, 9.0]]])
    near = (-((axis - centres[..., None]) ** 2) / 8).exp()  # [B, P, 2, side]
    target = near[:, :, 1, :, None] * near[:, :, 0, None, :]
    images = 0.3 * torch.rand(2, 3, 64, 64)
    images[:, :2] += 0.7 * nn.functional.interpolate(target, scale_factor=4.0)
    optimizer = torch.optim.Adam([*backbone.parameters(), *head.parameters()], 0.01)
    losses = []
    for _ in range(31):
        loss = nn.functional.mse_loss(head(backbone(images).map), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[30] < losses[0] / 10


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_checkpointing_changes_nothing_but_memory(norm: str) -> None:
    plain, thrifty = (tiny("stacked", norm=norm, stacks=4, checkpoint=flag) for flag in (False, True))
    for turn in range(2):
        images = torch.rand(3, 3, 32, 32)
        kept = []
        for backbone in (plain, thrifty):
            sizes: list[int] = []
            count = lambda tensor, sizes=sizes: (sizes.append(tensor.numel()), tensor)[1]  # noqa: E731
            with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
                found = backbone(images)
            kept.append(sum(sizes))
            total(found).backward()
        assert kept[1] < kept[0] / 3, turn
    for (key, first), second in zip(plain.named_parameters(), thrifty.parameters(), strict=True):
        torch.testing.assert_close(second.grad, first.grad, msg=key)
    for (key, first), second in zip(plain.named_buffers(), thrifty.buffers(), strict=True):
        assert torch.equal(first, second), key


@pytest.mark.parametrize("name", BACKBONES)
def test_an_image_does_not_see_the_others_with_groups(name: str) -> None:
    backbone, images = awake(tiny(name, norm="group")), torch.rand(3, 3, 32, 32)
    together, alone = backbone(images), backbone(images[1:2])
    torch.testing.assert_close(together.map[1:2], alone.map, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(together.vector[1:2], alone.vector, rtol=1e-4, atol=1e-5)


def test_groups_are_equal_and_of_eight_channels_or_more() -> None:
    groups = {channels: normalization(channels, "group").num_groups for channels in (1, 7, 8, 18, 36, 64, 97, 256)}
    assert groups == {1: 1, 7: 1, 8: 1, 18: 2, 36: 4, 64: 8, 97: 1, 256: 32}


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("norm", ["batch", "group"])
def test_sixteen_bits_follow_thirty_two(name: str, norm: str) -> None:
    """In evaluation: a batch's own statistics, over the 16 coarsest cells here, amplify any rounding."""
    backbone, images = awake(tiny(name, 64, norm=norm)), torch.rand(4, 3, 64, 64)
    with torch.autocast("cpu", torch.bfloat16):
        total(backbone(images)).backward()
        rough = backbone.eval()(images)
    assert all(parameter.grad.isfinite().all() for parameter in backbone.parameters())
    exact = backbone(images)
    for entry, expected in zip((rough.map, rough.vector), (exact.map, exact.vector), strict=True):
        assert (entry.float() - expected).square().mean().sqrt() < 0.05 * expected.std()


@pytest.mark.parametrize("name", BACKBONES)
def test_compiled_whole(name: str) -> None:
    options = {"hourglass": {"depth": 1}, "stacked": {"depth": 1, "checkpoint": True}}
    backbone, images = awake(tiny(name, **options.get(name, {}))), torch.rand(2, 3, 32, 32)
    compiled = torch.compile(copy.deepcopy(backbone), fullgraph=True, backend="aot_eager")
    found, expected = compiled(images), backbone(images)
    total(found).backward()
    total(expected).backward()
    torch.testing.assert_close(found.map, expected.map)
    torch.testing.assert_close(found.vector, expected.vector)
    for (key, parameter), other in zip(backbone.named_parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(other.grad, parameter.grad, rtol=1e-3, atol=1e-4, msg=key)


@pytest.mark.filterwarnings("ignore:No complete tensor")  # the weights are channels last; equality is tested here
@pytest.mark.parametrize("name", BACKBONES)
def test_exported_and_read_again(name: str) -> None:
    backbone, images = awake(tiny(name)).eval(), torch.rand(3, 3, 32, 32)
    dynamic = {"images": {0: torch.export.Dim("batch")}}
    file = io.BytesIO()
    torch.export.save(torch.export.export(Plain(backbone), (images[:2],), dynamic_shapes=dynamic), file)
    file.seek(0)
    found, expected = torch.export.load(file).module()(images), backbone(images)
    torch.testing.assert_close(found[0], expected.map)
    torch.testing.assert_close(found[1], expected.vector)


@pytest.mark.parametrize("name", BACKBONES)
def test_copies_and_states_give_the_same(name: str) -> None:
    backbone, images = awake(tiny(name)), torch.rand(2, 3, 32, 32)
    backbone(images)
    backbone.eval()
    other = tiny(name).eval()
    other.load_state_dict(backbone.state_dict())
    for same in (copy.deepcopy(backbone), other):
        assert torch.equal(same(images).map, backbone(images).map)
        assert torch.equal(same(images).vector, backbone(images).vector)
    assert backbone(images).map.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("name", "size", "options", "words"),
    [
        ("smal", 32, {}, "unknown backbone 'smal', did you mean 'small'?"),
        ("?", 32, {}, r"unknown backbone '\?', there are small, hourglass, stacked, highres"),
        ("stacked", 32, {"stack": 2}, "'stacked' has no option 'stack', did you mean 'stacks'?"),
        ("highres", 32, {"width": 1.5}, "'highres': width must be of its default's type, as 16, got 1.5"),
        ("stacked", 32, {"stacks": True}, "stacks must be of its default's type, as 2, got True"),
        ("highres", 32, {"modules": [1, 1, "1"]}, r"modules must be of its default's type, as \(1, 1, 1\), got"),
        ("small", 48, {}, "Backbone: image_size must be a positive multiple of 32, got 48"),
        ("stacked", 96, {"depth": 4}, "image_size must be a positive multiple of 64 at depth 4, got 96"),
        ("stacked", 0, {}, "image_size must be a positive multiple of 32 at depth 3, got 0"),
        ("highres", 100, {}, "HighResNet: image_size must be a positive multiple of 32, got 100"),
        ("stacked", 32, {"stacks": 9}, "stacks must be 1 to 8, got 9"),
        ("stacked", 32, {"depth": 0}, "depth and code must be at least 1, got 0 and 128"),
        ("hourglass", 32, {"width": 6}, "width must be a positive multiple of 4, got 6"),
        ("highres", 32, {"blocks": 0}, "width, blocks, channels and code must be at least 1, got 16, 0, 64, 128"),
        ("highres", 32, {"modules": [1, 0, 1]}, "modules must be three numbers >= 1"),
        ("small", 32, {"norm": "layer"}, "norm must be one of batch, group, got 'layer'"),
    ],
)
def test_a_wrong_request_is_told(name: str, size: int, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build_backbone(name, size, **options)


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("shape", [(2, 3, 32, 64), (3, 32, 32), (2, 1, 32, 32)], ids=str)
def test_images_of_another_shape_are_told(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"images must be \[B, 3, 32, 32\], got"):
        tiny(name)(torch.rand(shape))


def test_synchronizing_changes_nothing_in_one_process() -> None:
    plain, images = awake(tiny("stacked")), torch.rand(2, 3, 32, 32)
    parameters = list(plain.parameters())
    joined = synchronize_batch_norm(copy.deepcopy(plain))
    for train in (True, False):
        assert torch.equal(joined.train(train)(images).map, plain.train(train)(images).map)
    assert joined.state_dict().keys() == plain.state_dict().keys()
    joined.load_state_dict(plain.state_dict())
    assert torch.equal(copy.deepcopy(joined)(images).map, plain(images).map)
    assert synchronize_batch_norm(plain) is plain
    assert all(before is after for before, after in zip(parameters, plain.parameters(), strict=True))


def test_two_ranks_normalise_as_one(tmp_path: Path) -> None:
    """Two processes over gloo: outputs, gradients and running statistics of one process with the joined batch."""
    alone, first, second = on_two_ranks(norm_ranks, tmp_path)
    assert first.keys() == second.keys() == alone.keys()
    for name, value in alone.items():
        if ".rows." in name:
            found = torch.cat([first[name], second[name]])
        else:
            assert torch.equal(first[name], second[name]), name
            found = first[name]
        within = 1e-10 if "float64" in name else 1e-5
        if "bfloat16" in name and "state" not in name:
            within = 2**-8  # one step of outputs and gradients as they are stored
        scale = max(1.0, value.abs().max().item())
        torch.testing.assert_close(found / scale, value / scale, rtol=0, atol=within, msg=lambda m, n=name: f"{n}: {m}")
