"""Which expert each patch of an image goes to, as a picture: works for any model with `MoeMlp` layers."""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import timm
import torch
from sklearn.datasets import load_digits

import sparse_mlp  # noqa: F401 - registers the models with timm
from sparse_mlp.moe import telemetry

target = Path(sys.argv[1] if len(sys.argv) > 1 else "routing.png")
torch.manual_seed(0)
images = torch.tensor(load_digits().images[:6], dtype=torch.float32)[:, None] / 16 - 0.5
# Untrained here; checkpoint_path="runs/.../model.safetensors" for a trained one.
arguments = {"patch_size": 2, "in_chans": 1, "img_size": 8, "num_classes": 10, "rerepresent": False}
model = timm.create_model("sparse_mlp_t4_32", **arguments).eval()

with torch.no_grad(), telemetry.record(model) as records:
    model(images)
name = next(name for name in reversed(records) if name.endswith("mlp_channels"))
experts = records[name][0].experts[..., 0]  # (images, patches): the first choice of each patch
side = int(experts.shape[1] ** 0.5)

figure, axes = plt.subplots(2, len(images), figsize=(1.6 * len(images), 3.6), layout="constrained")
for image, chosen, (above, below) in zip(images, experts, axes.T, strict=True):
    above.imshow(image[0], cmap="gray")
    shown = below.imshow(chosen.view(side, side), cmap="tab10", vmin=0, vmax=9)
for axis in axes.flat:
    axis.set_axis_off()
figure.colorbar(shown, ax=axes[1], label="expert", ticks=range(10), shrink=0.8)
figure.suptitle(name)
figure.savefig(target)
print(f"{name}: {target}")
