"""A backbone of this package in your own code: feature maps at four strides, and pooled features."""

import timm
import torch

import sparse_mlp  # noqa: F401 - registers the models with timm

# pretrained=True fetches the authors' weights of cycle_mlp_b1 to b5
backbone = timm.create_model("cycle_mlp_b1", features_only=True, out_indices=(1, 2, 3))
maps = backbone(torch.randn(1, 3, 160, 224))  # any size from 32 pixels on
for stride, features in zip(backbone.feature_info.reduction(), maps, strict=True):
    print(f"stride {stride}: {tuple(features.shape)}")

# As a classifier's trunk: no head, one vector an image.
trunk = timm.create_model("sparse_mlp_s4_32", num_classes=0).eval()
with torch.no_grad():
    vectors = trunk(torch.randn(2, 3, 32, 32))
print(f"pooled: {tuple(vectors.shape)}")
