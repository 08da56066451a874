"""The decoders of segmentation-models-pytorch over any timm model, ours included."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor, nn

__all__ = ["SmpSegmenter", "smp_decoders"]


def smp_decoders() -> list[str]:
    """Names of its decoders: unet, fpn, segformer, ... ImportError without the library."""
    import segmentation_models_pytorch as smp

    return sorted(smp.MODEL_ARCHITECTURES_MAPPING)


class SmpSegmenter(nn.Module):
    """Images (B, 3, H, W) -> logits (B, classes, H, W); H and W divisible by 32.

    The backbone is the one that the library builds for `tu-NAME`, with the weights of `model`.
    """

    fixed_size: tuple[int, int] | None = None

    def __init__(self, model: nn.Module, name: str, decoder: str, num_classes: int) -> None:
        """ValueError for a model that the decoder cannot stand on."""
        import segmentation_models_pytorch as smp

        super().__init__()
        try:
            self.body: Any = smp.create_model(
                decoder, encoder_name=f"tu-{name}", encoder_weights=None, in_channels=3, classes=num_classes
            )
        # Encoders differ in what they raise for a decoder that asks for dilation or for levels that they lack.
        except (ArithmeticError, AttributeError, KeyError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"smp_{decoder} cannot stand on {name}: {str(error).splitlines()[0]}") from error
        self.model: nn.Module = self.body.encoder.model
        _copy_weights(model, self.model)

    def forward(self, x: Tensor, auxiliary: bool = False) -> Tensor | tuple[Tensor, None]:
        logits = self.body(x)
        return (logits, None) if auxiliary else logits

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the activations of the backbone in the backward pass."""
        self.model.set_grad_checkpointing(enable)  # type: ignore[operator]


def _copy_weights(source: nn.Module, target: nn.Module) -> None:
    """Give a feature extractor of timm's the weights of the whole model. ValueError if it has others besides."""
    stored, found = source.state_dict(), {}
    for name in target.state_dict():
        bare = name.removeprefix("model.")
        # Its list of features names the parts of a sequence stages_0, not stages.0.
        parts = re.sub(r"^([a-z_]+)_(\d+)\.", r"\1.\2.", bare)
        found[name] = stored.get(bare, stored.get(parts))
    missing = [name for name, value in found.items() if value is None]
    if missing:
        raise ValueError(f"{type(source).__name__}: no weights for {', '.join(missing[:3])} of the feature extractor")
    target.load_state_dict(found)
