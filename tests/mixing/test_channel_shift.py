"""Shifts of channels against loops over the definition; both forms, their gradients, dtypes and layouts."""

from __future__ import annotations

import pytest
import torch

from sparse_mlp.mixing import channel_shift
from sparse_mlp.mixing.axial_shift import axial_offsets, axial_shift
from sparse_mlp.mixing.channel_shift import shift_channels
from sparse_mlp.mixing.cycle_fc import CycleFC, cycle_offsets


def naive(x, offsets, axis):
    out = torch.zeros_like(x)
    for c, offset in enumerate(offsets):
        for i in range(x.shape[axis]):
            if 0 <= i + offset < x.shape[axis]:
                out[..., c].select(axis, i).copy_(x[..., c].select(axis, i + offset))
    return out


@pytest.mark.parametrize("axis", [1, 2])
@pytest.mark.parametrize("shape", [(2, 5, 7, 9), (1, 1, 1, 3), (3, 2, 1, 8), (1, 9, 2, 20)])
@pytest.mark.parametrize("form", [shift_channels, channel_shift._plain_shift], ids=["eager", "plain"])
def test_both_forms_equal_the_definition(form, shape, axis):
    x = torch.randn(shape)
    for offsets in (cycle_offsets(shape[-1], 3), axial_offsets(shape[-1], 5), tuple(range(shape[-1]))):
        torch.testing.assert_close(form(x, offsets, axis), naive(x, offsets, axis), rtol=0, atol=0)


def test_published_offsets():
    # CycleMLP: ((i + 1) mod 3) - 1; a sequence that began with -1 would change the logits by 0.29 of the largest
    assert cycle_offsets(7, 3) == (0, 1, -1, 0, 1, -1, 0)
    # AS-MLP: groups of ceil(96 / 5) = 20, the last of 16; the first group is displaced by -2, so it reads 2 further on
    assert [axial_offsets(96, 5).count(d) for d in (2, 1, 0, -1, -2)] == [20, 20, 20, 20, 16]
    assert axial_offsets(96, 5)[0] == 2 and axial_offsets(96, 5)[-1] == -2
    assert axial_offsets(8, 5) == (2, 2, 1, 1, 0, 0, -1, -1)  # four groups of two: the last displacement is not used
    assert axial_offsets(6, 1) == (0,) * 6


def test_zeros_move_in():
    x = torch.ones(1, 4, 4, 5)
    columns = axial_shift(x, 5, axis=2)[0, 0]  # (W, C), one channel per group
    assert columns.T.tolist() == [[1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1], [0, 1, 1, 1], [0, 0, 1, 1]]


@pytest.mark.parametrize("axis", [1, 2])
def test_gradients(axis):
    x = torch.randn(2, 4, 5, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: shift_channels(x, cycle_offsets(6, 3), axis), x)
    assert torch.autograd.gradgradcheck(lambda x: shift_channels(x, cycle_offsets(6, 3), axis) ** 2, x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_exact(dtype):
    x, offsets = torch.randn(2, 5, 6, 7).to(dtype), axial_offsets(7, 3)
    torch.testing.assert_close(shift_channels(x, offsets, 1), naive(x, offsets, 1), rtol=0, atol=0)


def test_strided_input_and_cached_kernels_work_in_and_out_of_inference_mode():
    x, offsets = torch.randn(2, 7, 5, 6).permute(0, 2, 3, 1), cycle_offsets(7, 3)
    with torch.inference_mode():
        expected = shift_channels(x, offsets, 1)
    leaf = x.clone().requires_grad_()
    shift_channels(leaf, offsets, 1).sum().backward()
    torch.testing.assert_close(expected, naive(x, offsets, 1), rtol=0, atol=0)
    assert leaf.grad.shape == x.shape


@pytest.mark.parametrize("axis", [1, 2])
@pytest.mark.parametrize("size", [(7, 9), (1, 3), (2, 1)])
def test_maps_in_planes_are_moved_in_planes(size, axis):
    planes = torch.randn(2, 11, *size, dtype=torch.float64, requires_grad=True)
    for offsets in (axial_offsets(11, 5), axial_offsets(11, 1), (3,) * 11):
        out = shift_channels(planes.permute(0, 2, 3, 1), offsets, axis)
        torch.testing.assert_close(out, naive(planes.permute(0, 2, 3, 1), offsets, axis), rtol=0, atol=0)
    assert torch.autograd.gradcheck(lambda p: shift_channels(p.permute(0, 2, 3, 1), axial_offsets(11, 5), axis), planes)


@pytest.mark.parametrize("axis", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_planes_of_half_precision_keep_infinities_where_they_are(axis, dtype):
    x = torch.randn(2, 5, 6, 20).to(dtype)
    x[0, 2, 3], x[1, 4, 0] = torch.inf, -torch.inf
    planes = x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    out = shift_channels(planes, axial_offsets(20, 5), axis)
    torch.testing.assert_close(out, naive(x, axial_offsets(20, 5), axis), rtol=0, atol=0)


@pytest.mark.parametrize("axis", [1, 2])
def test_gradients_of_runs(axis):
    x = torch.randn(2, 4, 3, 10, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: shift_channels(x, axial_offsets(10, 5), axis), x)
    assert torch.autograd.gradgradcheck(lambda x: shift_channels(x, axial_offsets(10, 5), axis) ** 2, x)


def test_transforms_and_compiler_take_the_plain_form():
    x, offsets = torch.randn(2, 4, 5, 6), cycle_offsets(6, 3)
    expected = shift_channels(x, offsets, 2)
    mapped = torch.func.vmap(lambda image: shift_channels(image[None], offsets, 2)[0])(x)
    torch.testing.assert_close(mapped, expected, rtol=0, atol=0)
    compiled = torch.compile(lambda x: shift_channels(x, offsets, 2), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected, rtol=0, atol=0)


def test_cycle_fc_is_the_published_deformable_convolution():
    from torchvision.ops import deform_conv2d

    x = torch.randn(2, 5, 6, 9)
    for axis, place in ((2, 1), (1, 0)):
        module = CycleFC(9, 4, axis)
        offset = torch.zeros(9, 2)
        offset[:, place] = torch.tensor(cycle_offsets(9, 3))
        maps = offset.view(1, 18, 1, 1).expand(2, -1, 5, 6)
        expected = deform_conv2d(x.permute(0, 3, 1, 2), maps, module.weight[..., None, None], module.bias)
        torch.testing.assert_close(module(x), expected.permute(0, 2, 3, 1), rtol=1e-5, atol=1e-6)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match=r"\(B, H, W, 3\)"):
        shift_channels(torch.zeros(1, 2, 2, 4), (0, 1, -1), 1)
    with pytest.raises(ValueError, match="odd"):
        axial_offsets(8, 4)
    with pytest.raises(ValueError, match="axis"):
        CycleFC(3, 3, axis=3)
