"""Experts in a timm ViT: `MoeMlp` in place of the MLPs of its last blocks, trained on the digits in a plain loop."""

import timm
import torch
from sklearn.datasets import load_digits
from torch.nn import functional as F

from sparse_mlp.moe import MoeMlp, set_balance_scale, telemetry

EPOCHS, BATCH, ACCUMULATE = 8, 64, 2

torch.manual_seed(0)
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16 - 0.5
labels = torch.tensor(digits.target)
order = torch.randperm(len(images))
train, test = order[:1400], order[1400:]

model = timm.create_model(
    "vit_tiny_patch16_224", img_size=8, patch_size=2, in_chans=1, num_classes=10, embed_dim=64, depth=4, num_heads=4
)
for block in model.blocks[-2:]:
    block.mlp = MoeMlp(dim=64, hidden_dim=128, num_experts=4, top_k=1)

optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
set_balance_scale(model, 1 / ACCUMULATE)  # the loop divides its loss by as much
for epoch in range(EPOCHS):
    model.train()
    for rows in train[torch.randperm(len(train))].split(BATCH):
        for part in rows.chunk(ACCUMULATE):
            loss = F.cross_entropy(model(images[part]), labels[part])
            (loss / ACCUMULATE).backward()  # the balance losses come along
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        accuracy = (model(images[test]).argmax(1) == labels[test]).float().mean()
    print(f"epoch {epoch + 1}: {accuracy:.1%} of {len(test)} test digits")

for name, stats in telemetry.collect(model).items():
    print(name, "load of the experts:", [f"{share:.2f}" for share in stats.load.tolist()])
