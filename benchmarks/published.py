"""AS-MLP, CycleMLP and Hire-MLP in the form in which they were published, to compare with: same layout of keys, same
operators.

Written from the papers and from descriptions of the authors' code; small, for evaluation only, and used by the
benchmarks and as the reference of the tests. AS-MLP: (B, C, H, W), 1x1 convolutions, shift by pad, chunk, roll, cat and
crop. CycleMLP: channels last, cycle FC by `torchvision.ops.deform_conv2d`. Hire-MLP: (B, C, H, W), 1x1 convolutions,
roll, circular pad and reshape.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import deform_conv2d

VARIANTS = {
    "as_mlp_tiny": {"depths": (2, 2, 6, 2), "dims": (96, 192, 384, 768)},
    "as_mlp_small": {"depths": (2, 2, 18, 2), "dims": (96, 192, 384, 768)},
    "as_mlp_base": {"depths": (2, 2, 18, 2), "dims": (128, 256, 512, 1024)},
    "cycle_mlp_b1": {"depths": (2, 2, 4, 2), "dims": (64, 128, 320, 512)},
    "cycle_mlp_b2": {"depths": (2, 3, 10, 3), "dims": (64, 128, 320, 512)},
    "cycle_mlp_b3": {"depths": (3, 4, 18, 3), "dims": (64, 128, 320, 512), "ratios": (8, 8, 4, 4)},
    "cycle_mlp_b4": {"depths": (3, 8, 27, 3), "dims": (64, 128, 320, 512), "ratios": (8, 8, 4, 4)},
    "cycle_mlp_b5": {"depths": (3, 4, 24, 3), "dims": (96, 192, 384, 768)},
    "hire_mlp_tiny": {"depths": (2, 2, 4, 2), "dims": (64, 128, 320, 512)},
    "hire_mlp_small": {"depths": (3, 4, 10, 3), "dims": (64, 128, 320, 512)},
    "hire_mlp_base": {"depths": (4, 6, 24, 3), "dims": (64, 128, 320, 512)},
    "hire_mlp_large": {"depths": (4, 6, 24, 3), "dims": (96, 192, 384, 768)},
}


def build(name: str, dense: bool = False, num_classes: int = 1000) -> nn.Module:
    """Return the published form of a variant: a classifier, or with `dense` a backbone with four normed maps."""
    cls = {"as": PublishedAsMlp, "cycle": PublishedCycleMlp, "hire": PublishedHireMlp}[name.split("_")[0]]
    return cls(dense=dense, num_classes=num_classes, **VARIANTS[name])


def conv1x1(in_dim: int, out_dim: int, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(in_dim, out_dim, 1, bias=bias)


class ConvMlp(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = conv1x1(dim, hidden), conv1x1(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class LinearMlp(nn.Module):
    def __init__(self, dim: int, hidden: int, out: int | None = None) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, out or dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


# --- AS-MLP ---

GroupNorm1 = partial(nn.GroupNorm, 1)


def roll_shift(x: Tensor, shift_size: int, dim: int) -> Tensor:
    """The pure-torch axial shift of the authors on (B, C, H, W): pad all sides, chunk channels, roll, cat, crop."""
    pad, (height, width) = shift_size // 2, x.shape[2:]
    x = F.pad(x, (pad, pad, pad, pad))
    chunks = x.chunk(shift_size, 1)
    x = torch.cat([chunk.roll(shift, dim) for chunk, shift in zip(chunks, range(-pad, pad + 1), strict=False)], 1)
    return x.narrow(2, pad, height).narrow(3, pad, width)


class AsUnit(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv1, self.conv2_1, self.conv2_2, self.conv3 = (conv1x1(dim, dim) for _ in range(4))
        self.norm1, self.norm2 = GroupNorm1(dim), GroupNorm1(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.norm1(self.conv1(x)))
        horizontal, vertical = self.conv2_1(roll_shift(x, 5, 3)), self.conv2_2(roll_shift(x, 5, 2))
        return self.conv3(self.norm2(F.gelu(horizontal) + F.gelu(vertical)))


class AsBlock(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm1, self.axial_shift, self.norm2, self.mlp = (
            GroupNorm1(dim),
            AsUnit(dim),
            GroupNorm1(dim),
            ConvMlp(dim, 4 * dim),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.axial_shift(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class AsMerging(nn.Module):
    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.reduction, self.norm = conv1x1(4 * dim, out, bias=False), GroupNorm1(4 * dim)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2))
        corners = [x[..., i::2, j::2] for j in (0, 1) for i in (0, 1)]
        return self.reduction(self.norm(torch.cat(corners, 1)))


class AsStage(nn.Module):
    def __init__(self, dim: int, depth: int, out: int | None) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(AsBlock(dim) for _ in range(depth)))
        self.downsample = AsMerging(dim, out) if out else None


class AsEmbed(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj, self.norm = nn.Conv2d(3, dim, 4, 4), GroupNorm1(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(F.pad(x, (0, -x.shape[3] % 4, 0, -x.shape[2] % 4))))


class PublishedAsMlp(nn.Module):
    def __init__(self, depths, dims, dense: bool = False, num_classes: int = 1000) -> None:
        super().__init__()
        self.dense = dense
        self.patch_embed = AsEmbed(dims[0])
        self.layers = nn.ModuleList(AsStage(d, n, o) for d, n, o in zip(dims, depths, (*dims[1:], None), strict=True))
        if dense:
            for i, dim in enumerate(dims):
                self.add_module(f"norm{i}", GroupNorm1(dim))
        else:
            self.norm, self.head = GroupNorm1(dims[-1]), nn.Linear(dims[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        x, outs = self.patch_embed(x), []
        for i, layer in enumerate(self.layers):
            x = layer.blocks(x)
            if self.dense:
                outs.append(self.get_submodule(f"norm{i}")(x))
            if layer.downsample is not None:
                x = layer.downsample(x)
        return outs if self.dense else self.head(self.norm(x).mean((2, 3)))


# --- CycleMLP ---


class DeformCycleFC(nn.Module):
    """Cycle FC on (B, C, H, W) as published: a 1x1 deformable convolution, one fixed integer offset per channel."""

    def __init__(self, dim: int, out: int, kernel: tuple[int, int]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out, dim, 1, 1) * dim**-0.5)
        self.bias = nn.Parameter(torch.zeros(out))
        offset, length = torch.zeros(1, 2 * dim, 1, 1), max(kernel)
        for i in range(dim):
            offset[0, 2 * i + (1 if kernel[0] == 1 else 0)] = (i + length // 2) % length - length // 2
        self.register_buffer("offset", offset)

    def forward(self, x: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        return deform_conv2d(x, self.offset.expand(batch, -1, height, width), self.weight, self.bias)


class CycleMixer(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mlp_c = nn.Linear(dim, dim, bias=False)
        self.sfc_h, self.sfc_w = DeformCycleFC(dim, dim, (1, 3)), DeformCycleFC(dim, dim, (3, 1))
        self.reweight = LinearMlp(dim, dim // 4, dim * 3)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, _, _, dim = x.shape
        h = self.sfc_h(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        w = self.sfc_w(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        c = self.mlp_c(x)
        a = (h + w + c).permute(0, 3, 1, 2).flatten(2).mean(2)
        a = self.reweight(a).reshape(batch, dim, 3).permute(2, 0, 1).softmax(0).unsqueeze(2).unsqueeze(2)
        return self.proj(h * a[0] + w * a[1] + c * a[2])


class CycleBlock(nn.Module):
    def __init__(self, dim: int, ratio: int) -> None:
        super().__init__()
        self.norm1, self.attn, self.norm2, self.mlp = (
            nn.LayerNorm(dim),
            CycleMixer(dim),
            nn.LayerNorm(dim),
            LinearMlp(dim, ratio * dim),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class CycleConv(nn.Module):
    """Patch embedding (7, 4, 2) or downsampling (3, 2, 1): a convolution; input (B, H, W, C) with `nhwc`."""

    def __init__(self, dim: int, out: int, kernel: int, stride: int, padding: int, nhwc: bool) -> None:
        super().__init__()
        self.nhwc, self.proj = nhwc, nn.Conv2d(dim, out, kernel, stride, padding)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x.permute(0, 3, 1, 2) if self.nhwc else x).permute(0, 2, 3, 1)


class PublishedCycleMlp(nn.Module):
    def __init__(self, depths, dims, ratios=(4, 4, 4, 4), dense: bool = False, num_classes: int = 1000) -> None:
        super().__init__()
        self.dense = dense
        self.patch_embed = CycleConv(3, dims[0], 7, 4, 2, nhwc=False)
        network: list[nn.Module] = []
        for i, dim in enumerate(dims):
            if i:
                network.append(CycleConv(dims[i - 1], dim, 3, 2, 1, nhwc=True))
            network.append(nn.Sequential(*(CycleBlock(dim, ratios[i]) for _ in range(depths[i]))))
        self.network = nn.ModuleList(network)
        if dense:
            for i, dim in enumerate(dims):
                self.add_module(f"norm{2 * i}", nn.LayerNorm(dim))
        else:
            self.norm, self.head = nn.LayerNorm(dims[-1]), nn.Linear(dims[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        x, outs = self.patch_embed(x), []
        for i, part in enumerate(self.network):
            x = part(x)
            if self.dense and i % 2 == 0:
                outs.append(self.get_submodule(f"norm{i}")(x).permute(0, 3, 1, 2))
        return outs if self.dense else self.head(self.norm(x).flatten(1, 2).mean(1))


# --- Hire-MLP ---


class HireMixer(nn.Module):
    def __init__(self, dim: int, pixel: int, step: int) -> None:
        super().__init__()
        self.pixel, self.step = pixel, step
        for axis in "hw":
            self.add_module(f"mlp_{axis}1", conv1x1(dim * pixel, dim // 2, bias=False))
            self.add_module(f"mlp_{axis}1_norm", nn.BatchNorm2d(dim // 2))
            self.add_module(f"mlp_{axis}2", conv1x1(dim // 2, dim * pixel))
        self.mlp_c = conv1x1(dim, dim)
        self.reweight = ConvMlp(dim, dim // 4)
        self.reweight.fc2 = conv1x1(dim // 4, dim * 3)
        self.proj = conv1x1(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, dim, height, width = x.shape
        p, s = self.pixel, self.step
        h = F.pad(x.roll(s, 2), (0, 0, 0, -height % p), mode="circular")
        w = F.pad(x.roll(s, 3), (0, -width % p, 0, 0), mode="circular")
        rows, columns = h.shape[2] // p, w.shape[3] // p
        h = h.reshape(batch, dim, rows, p, width).permute(0, 1, 3, 2, 4).reshape(batch, dim * p, rows, width)
        w = w.reshape(batch, dim, height, columns, p).permute(0, 1, 4, 2, 3).reshape(batch, dim * p, height, columns)
        h = self.mlp_h2(F.relu(self.mlp_h1_norm(self.mlp_h1(h))))
        w = self.mlp_w2(F.relu(self.mlp_w1_norm(self.mlp_w1(w))))
        h = h.reshape(batch, dim, p, rows, width).permute(0, 1, 3, 2, 4).reshape(batch, dim, rows * p, width)
        w = w.reshape(batch, dim, p, height, columns).permute(0, 1, 3, 4, 2).reshape(batch, dim, height, columns * p)
        h, w, c = h[:, :, :height].roll(-s, 2), w[..., :width].roll(-s, 3), self.mlp_c(x)
        a = self.reweight((h + w + c).mean((2, 3), keepdim=True))
        a = a.reshape(batch, dim, 3).permute(2, 0, 1).softmax(0)[..., None, None]
        return self.proj(h * a[0] + w * a[1] + c * a[2])


class HireBlock(nn.Module):
    def __init__(self, dim: int, pixel: int, step: int) -> None:
        super().__init__()
        self.norm1, self.attn = nn.BatchNorm2d(dim), HireMixer(dim, pixel, step)
        self.norm2, self.mlp = nn.BatchNorm2d(dim), ConvMlp(dim, 4 * dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class HireConv(nn.Module):
    def __init__(self, dim: int, out: int, kernel: int, stride: int, padding: int) -> None:
        super().__init__()
        self.proj, self.norm = nn.Conv2d(dim, out, kernel, stride, padding), nn.BatchNorm2d(out)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.proj(x)))


class PublishedHireMlp(nn.Module):
    def __init__(self, depths, dims, dense: bool = False, num_classes: int = 1000) -> None:
        super().__init__()
        self.dense = dense
        self.patch_embed = HireConv(3, dims[0], 7, 4, 2)
        network: list[nn.Module] = []
        for i, (dim, pixel, cycle, dilation) in enumerate(
            zip(dims, (4, 3, 3, 2), (2, 2, 3, 2), (2, 2, 1, 1), strict=True)
        ):
            if i:
                network.append(HireConv(dims[i - 1], dim, 3, 2, 1))
            network.append(nn.Sequential(*(HireBlock(dim, pixel, k % cycle * dilation) for k in range(depths[i]))))
        self.network = nn.ModuleList(network)
        if dense:
            for i, dim in enumerate(dims):
                self.add_module(f"norm{2 * i}", nn.BatchNorm2d(dim))
        else:
            self.norm, self.head = nn.BatchNorm2d(dims[-1]), nn.Linear(dims[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        x, outs = self.patch_embed(x), []
        for i, part in enumerate(self.network):
            x = part(x)
            if self.dense and i % 2 == 0:
                outs.append(self.get_submodule(f"norm{i}")(x))
        return outs if self.dense else self.head(self.norm(x).mean((2, 3)))
