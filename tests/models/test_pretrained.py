"""`pretrained=True`: published weights through timm's own mechanism, without a network; and where there are none."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from sparse_mlp.models import registered_names

RELEASE = "https://github.com/ShoufaChen/CycleMLP/releases/download/v0.1/"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """torch's hub cache, empty; nothing can be fetched into it."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda url, *args, **kwargs: pytest.fail(f"fetches {url}"))
    (tmp_path / "checkpoints").mkdir()
    return tmp_path / "checkpoints"


@pytest.mark.parametrize("number", range(1, 6))
def test_cycle_mlps_have_the_address_of_the_authors_release(number: int) -> None:
    assert timm.get_pretrained_cfg(f"cycle_mlp_b{number}").url == f"{RELEASE}CycleMLP_B{number}.pth"
    assert f"cycle_mlp_b{number}.in1k" in timm.list_pretrained("cycle_mlp*")


def test_the_authors_file_of_cycle_mlp_b1(hub: Path, reference) -> None:
    published, state_dict = reference.weights("cycle_mlp_b1")
    torch.save({"model": state_dict}, hub / "CycleMLP_B1.pth")
    images = reference.images(1, 64, 64)
    model = timm.create_model("cycle_mlp_b1", pretrained=True).eval()
    with torch.inference_mode():
        expected, logits = published(images), model(images)
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    other = timm.create_model("cycle_mlp_b1", pretrained=True, num_classes=5, in_chans=1)
    assert torch.equal(other.norm.weight, model.norm.weight) and other.head.out_features == 5
    maps = timm.create_model("cycle_mlp_b1", pretrained=True, features_only=True)
    assert torch.equal(maps.model.stem.proj.weight, model.stem.proj.weight)


@pytest.fixture
def mixer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[nn.Module, Path]:
    """timm's Mixer-B/16 and a Hugging Face cache that holds its weights; no network is tried."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    model = timm.create_model("mixer_b16_224")
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02)
    repository = tmp_path / "models--timm--mixer_b16_224.goog_in21k_ft_in1k"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    save_file(model.state_dict(), snapshot / "model.safetensors")
    return model, tmp_path


def test_sparse_b16_without_sparse_blocks_takes_timms_mixer(mixer: tuple[nn.Module, Path]) -> None:
    source, cache = mixer
    model = timm.create_model("sparse_mlp_b16_224", sparse_blocks=0, pretrained=True, cache_dir=cache)
    assert model.state_dict().keys() == source.state_dict().keys()
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in model.state_dict().items())
    small = timm.create_model(
        "sparse_mlp_b16_224", sparse_blocks=(), pretrained=True, cache_dir=cache, img_size=64, num_classes=3
    )
    assert torch.equal(small.stem.proj.weight, source.stem.proj.weight)
    assert small(torch.randn(1, 3, 64, 64)).shape == (1, 3)


@pytest.mark.parametrize("name", [name for name in registered_names() if "cycle_mlp" not in name])
def test_where_there_are_no_weights_the_error_says_what_there_is(name: str) -> None:
    with pytest.raises(RuntimeError, match=rf"published weights of {name}") as error:
        timm.create_model(name, pretrained=True)
    message = str(error.value)
    assert "\n" not in message
    if name == "sparse_mlp_b16_224":
        assert "sparse_blocks=0 takes those of timm's mixer_b16_224" in message
    if name.startswith("as_mlp"):
        assert "https://github.com/svip-lab/AS-MLP" in message and f"--model {name}" in message
    if name.startswith("hire_mlp"):
        assert "https://github.com/ggjy/Hire-Wave-MLP.pytorch" in message and f"--model {name}" in message


def test_weights_that_are_named_are_taken_with_sparse_blocks_too(tmp_path: Path) -> None:
    source = timm.create_model("sparse_mlp_t4_32")
    save_file(source.state_dict(), tmp_path / "model.safetensors")
    overlay = {"file": str(tmp_path / "model.safetensors")}
    model = timm.create_model("sparse_mlp_t4_32", pretrained=True, pretrained_cfg_overlay=overlay)
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in model.state_dict().items())
