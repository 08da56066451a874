# %% [markdown]
# A dataset of your own, trained by a recipe; open it as a notebook or run it as a script.

# %%
import tempfile
from pathlib import Path

from PIL import Image, ImageDraw
from torch.utils.data import Dataset

import sparse_mlp

# %% Any map-style dataset of (image, label) will do; images may be of PIL, uint8 tensors or arrays.


class Shapes(Dataset):
    """Circles and squares of differing sizes and places."""

    classes = ("circle", "square")

    def __init__(self, count: int, first: int = 0) -> None:
        self.count, self.first = count, first

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        number = self.first + index
        image, radius = Image.new("L", (16, 16)), 3 + number // 2 % 3
        x, y = 6 + number // 6 % 5, 6 + number // 30 % 5
        draw = ImageDraw.Draw(image)
        (draw.rectangle if number % 2 else draw.ellipse)((x - radius, y - radius, x + radius, y + radius), fill=220)
        return image, number % 2


# %%
recipe = sparse_mlp.recipe(
    "digits_sparse",
    model={"args": {"patch_size": 4, "num_blocks": 2, "embed_dim": 32, "sparse_blocks": 1}},
    data={"batch_size": 32},
    train={"epochs": 10},
)
out = Path(tempfile.mkdtemp()) / "shapes"
run = sparse_mlp.train(recipe, out=out, datasets=(Shapes(256), Shapes(64, first=256)))
print(f"top-1 {run.metrics['top1']:.1%}; the report is {out / 'report.html'}")

# %%
Shapes(1)[0][0].save(out / "new.png")
print(run.predict(out / "new.png"))
