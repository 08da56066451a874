"""What the page embeds for exploring: right numbers, placed on the image, for models of every kind, and small."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from timm.models.mlp_mixer import MlpMixer
from torch import Tensor, nn

import sparse_mlp
from sparse_mlp.jobs import to_json
from sparse_mlp.moe import MoeMlp, telemetry
from sparse_mlp.report import ImageSource, Samples, write_routing_report
from sparse_mlp.report.explore import ExploreSection, embed, explore_section, images_to_explore
from sparse_mlp.report.routing import spatial_filters, trace
from sparse_mlp.report.vocabulary import CROP, crop, vocabularies


def sparse_vit(num_experts: int = 4, blocks: int = 2, **arguments: Any) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, num_classes=3, depth=3)
    for block in model.blocks[-blocks:]:
        block.mlp = MoeMlp(model.embed_dim, 32, num_experts, **arguments)
    return model.eval()


def sparse_pyramid() -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model("cycle_mlp_b1", num_classes=3, img_size=64)
    model.stages[-1].blocks[-1].mlp = MoeMlp(512, 32, 4)
    return model.eval()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def samples_of(images: Tensor) -> Samples:
    return Samples(images, torch.arange(len(images)) % 3, torch.arange(len(images)), (0.5,) * 3, (0.25,) * 3)


def source_of(images: Tensor) -> ImageSource:
    whole = samples_of(images)

    def read(indices: Any) -> Samples:
        rows = torch.tensor(list(indices))
        return Samples(whole.images[rows], whole.targets[rows], rows, whole.mean, whole.std)

    return ImageSource(read, range(len(images)), len(images), ["a", "b", "c"])


def section_of(model: nn.Module, images: Tensor) -> ExploreSection | None:
    samples = samples_of(images)
    titles = [(str(i), "") for i in range(len(images))]
    return explore_section(model, samples, titles, trace(model, images), source_of(images))


def data_of(model: nn.Module, images: Tensor) -> dict[str, Any]:
    section = section_of(model, images)
    assert section is not None and len(section.data) < 4_000_000
    return json.loads(section.data)


def test_scores_and_choices_are_the_layers_without_the_class_token(images: Tensor) -> None:
    model = sparse_vit(top_k=2)
    (_, layer) = data_of(model, images)["patches"]
    with telemetry.record(model) as records, torch.no_grad():
        model(images)
    (record,) = records["blocks.2.mlp"]
    assert layer["name"] == "blocks.2.mlp" and layer["grid"] == [4, 4] and layer["exact"]
    chosen = np.frombuffer(base64.b64decode(layer["chosen"]), "<i2").reshape(6, 16, 2)
    np.testing.assert_array_equal(chosen, record.experts[:, 1:])
    scores = np.frombuffer(base64.b64decode(layer["values"]), np.uint8).reshape(6, 16, 4) / 255
    np.testing.assert_allclose(np.take_along_axis(scores, chosen, -1), record.gates[:, 1:], atol=0.003)
    np.testing.assert_allclose(scores.sum(-1), 1, atol=0.01)


def test_a_dropped_patch_has_no_expert(images: Tensor) -> None:
    model = sparse_vit(eval_capacity_ratio=12 / 17)
    layer = data_of(model, images)["patches"][0]
    chosen = np.frombuffer(base64.b64decode(layer["chosen"]), "<i2")
    assert -1 in chosen and chosen.max() == 3


def test_items_in_rows_and_columns_need_no_guess() -> None:
    images = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    (layer,) = data_of(sparse_pyramid(), images)["patches"]
    assert layer["grid"] == [2, 3] and layer["exact"]


@pytest.mark.parametrize(
    ("name", "arguments", "grid"),
    [
        ("deit_tiny_distilled_patch16_224", {"img_size": 64}, [4, 4]),  # two tokens that are no patches
        ("swin_tiny_patch4_window7_224", {"img_size": 64, "window_size": 2}, [2, 2]),
        ("convnext_atto", {}, [2, 2]),  # (B, C, H, W)
        ("mixer_s16_224", {"img_size": 64}, [4, 4]),
        ("cycle_mlp_b1", {}, [2, 2]),
    ],
)
def test_sparsified_models_have_their_patches(name: str, arguments: dict[str, Any], grid: list[int]) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3, **arguments).eval()
    model = sparse_mlp.sparsify(model, blocks=1, num_experts=4, renormalize=True).eval()
    section = section_of(model, torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
    assert section is not None and not section.unplaced
    layer = json.loads(section.data)["patches"][-1]
    assert layer["grid"] == grid and layer["exact"] and layer["words"]["items"]


def test_a_layer_whose_items_are_no_patches_is_named() -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.moe = MoeMlp(8, 4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.moe(x.flatten(2).transpose(1, 2)[:, :7, :1].expand(-1, -1, 8)).mean(1)

    section = section_of(Pooled(), torch.randn(6, 3, 32, 32))
    assert section is not None and not section.patches
    assert section.unplaced == [("moe", "its 7 items per image are no grid of the image's shape")]


def test_of_a_dense_model_there_is_nothing_to_explore(images: Tensor) -> None:
    assert section_of(timm.create_model("resnet10t", num_classes=3), images) is None


def test_the_vocabulary_against_a_loop(images: Tensor) -> None:
    model = sparse_vit()
    found = vocabularies(model, source_of(images), 4)["blocks.1.mlp"]
    with telemetry.record(model) as records, torch.no_grad():
        model(images)
    record = records["blocks.1.mlp"][0]
    for expert in range(4):
        liked = []
        for image in range(6):
            own = [(float(record.gates[image, 1 + p, 0]), image, p) for p in range(16) if
                   record.experts[image, 1 + p, 0] == expert]  # fmt: skip
            liked += [max(own, key=lambda entry: entry[0])] if own else []
        liked = sorted(liked, key=lambda entry: -entry[0])[:4]
        there = found.image[expert] >= 0
        assert there.sum() == len(liked)
        assert [(i, p) for _, i, p in liked] == list(zip(found.image[expert], found.patch[expert], strict=True))[
            : len(liked)
        ]
        np.testing.assert_allclose(found.liking[expert][there], [gate for gate, _, _ in liked], rtol=1e-5)
        assert found.target[expert][there].tolist() == [i % 3 for _, i, _ in liked]


def test_an_attribution_counts_against_its_place_in_other_images() -> None:
    images = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(0)
    model = timm.create_model("sparse_mlp_t4_32", num_classes=3, in_chans=1, img_size=8, patch_size=2).eval()
    whole = Samples(images, torch.zeros(6, dtype=torch.long), torch.arange(6), (0.5,), (0.25,))
    rows = ImageSource(
        lambda wanted: Samples(
            images[list(wanted)], whole.targets[list(wanted)], torch.tensor(wanted), (0.5,), (0.25,)
        ),
        range(6),
        6,
        ["a"],
    )
    found = vocabularies(model, rows, 3)["blocks.5.mlp_channels"]
    shares = trace(model, images).patches[1].shares
    excess = shares - shares.mean(axis=0)
    for expert in range(4):
        best = sorted(((excess[i, :, expert].max(), i) for i in range(6)), reverse=True)[:3]
        assert found.image[expert].tolist() == [i for _, i in best]
        assert found.patch[expert].tolist() == [excess[i, :, expert].argmax() for _, i in best]


def test_a_crop_has_the_patch_in_its_middle() -> None:
    pixels = np.zeros((12, 12, 3), np.uint8)
    pixels[4:8, 8:12] = 255
    found = crop(pixels, (3, 3), 5)
    third = CROP // 3
    assert found.shape == (CROP, CROP, 3)
    assert (found[third : 2 * third, third : 2 * third] == 255).all()
    assert (found[:, 2 * third :] == 128).all() and (found[:, :third] == 0).all()


def test_spatial_filters_go_through_the_weight_before_them() -> None:
    torch.manual_seed(0)
    layer, weight = MoeMlp(6, 5, 2), np.random.default_rng(0).normal(size=(6, 4))
    found = spatial_filters(layer, weight, most=3)
    for expert in range(2):
        own = layer.experts.fc1.weight[expert].detach().double().numpy().T @ weight
        largest = sorted(own.tolist(), key=lambda row: -np.linalg.norm(row))[:3]
        np.testing.assert_allclose(found[expert], largest)


def test_filters_of_a_mixer_whose_token_mixing_has_experts(images: Tensor) -> None:
    torch.manual_seed(0)
    model = MlpMixer(num_classes=3, img_size=32, patch_size=8, num_blocks=2, embed_dim=16).eval()
    model.blocks[1].mlp_tokens = MoeMlp(16, 8, 4)
    (layer,) = data_of(model, images)["channels"]
    levels = np.frombuffer(base64.b64decode(layer["filters"]), np.int8).reshape(4, layer["count"], 16)
    assert layer["grid"] == [4, 4] and layer["count"] == 8
    np.testing.assert_array_equal(np.abs(levels).max(-1), 127)


@pytest.mark.slow  # 64 experts in each of 12 blocks
def test_a_large_model_stays_below_the_limit() -> None:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=3, depth=12)
    for block in model.blocks:
        block.mlp = MoeMlp(model.embed_dim, 8, 64)
    images = torch.rand(24, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    data = data_of(model, images)
    assert len(data["patches"]) == 12 and data["images"]


def test_json_in_a_page_cannot_end_its_script() -> None:
    text = ["</script><!--", "&amp;", "\u2028"]
    assert json.loads(embed(text)) == text and not set("<>&\u2028") & set(embed(text))


def test_all_images_are_looked_at_while_that_takes_no_time() -> None:
    assert images_to_explore(599, 10**6) == list(range(599))
    few = images_to_explore(50_000, 10**10)
    assert len(few) == 200 and few[0] == 0 and few[-1] == 49_999
    assert images_to_explore(0, None) == []


@pytest.mark.slow  # a vision transformer at its own size
def test_the_page_of_two_dozen_photos_stays_below_five_megabytes(tmp_path: Path) -> None:
    """Of a timm ViT with experts in every second block; the pictures are as rich in detail as photos are."""
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=10).eval()
    sparse_mlp.sparsify(model, "every-2", 8)
    sides = (4, 16, 56, 224)
    scales = [nn.functional.interpolate(torch.randn(24, 3, side, side), 224, mode="bicubic") for side in sides]
    images = torch.stack(scales).mean(0)

    def read(indices: list[int]) -> Samples:
        number = torch.tensor(indices)
        return Samples(images[number], number, number, (0.5,) * 3, (0.25,) * 3)

    (tmp_path / "config.json").write_text(json.dumps(to_json(sparse_mlp.recipe("digits_sparse"))))
    source = ImageSource(read, range(24), 24, [f"{i}.jpg" for i in range(24)])
    page = write_routing_report(tmp_path, model.eval(), source, [str(i) for i in range(10)])
    assert "23.jpg" in page.read_text()
    assert page.stat().st_size < 5_000_000
