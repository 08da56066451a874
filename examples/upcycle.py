"""A trained timm ViT gets experts and is trained on: at the seam its answers are the same, then the experts part."""

import timm
import torch
from sklearn.datasets import load_digits
from torch.nn import functional as F

import sparse_mlp
from sparse_mlp.weights import prune_experts

torch.manual_seed(0)
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16 - 0.5
labels = torch.tensor(digits.target)
order = torch.randperm(len(images))
train, test = order[:1400], order[1400:]


def train_for(model, epochs, lr):
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    for _ in range(epochs):
        for rows in train[torch.randperm(len(train))].split(64):
            loss = F.cross_entropy(model.train()(images[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


@torch.no_grad()
def accuracy(model):
    return (model.eval()(images[test]).argmax(1) == labels[test]).float().mean().item()


model = timm.create_model(
    "vit_tiny_patch16_224", img_size=8, patch_size=2, in_chans=1, num_classes=10, embed_dim=64, depth=4, num_heads=4
)
train_for(model, epochs=10, lr=3e-3)
print(f"dense: {accuracy(model):.1%} of {len(test)} test digits")
sparse_mlp.sparsify(model, blocks="last-2", num_experts=4, top_k=1)
print(f"with experts, before any step: {accuracy(model):.1%}")
train_for(model, epochs=5, lr=1e-3)
print(f"trained on: {accuracy(model):.1%}")
prune_experts(model, images[train], keep=2)
print(f"with the two experts of each layer that are used most: {accuracy(model):.1%}")
