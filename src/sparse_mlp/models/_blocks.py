"""Where a timm model keeps its MLPs: its blocks in their order, which of them are meant, and a swap.

An MLP is found by its place: it is called `mlp` (`mlp_tokens`, `mlp_channels`, `ffn`, ...) in a numbered block. So what
only makes position biases, gates channels or pools (`attn.rel_pos.mlp`, `meta_mlp`, `attn_pool.mlp`) is left alone, and
so are the last blocks of CaiT, XCiT and VOLO, which see one token an image.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from sparse_mlp.moe.dense import read_mlp

__all__ = ["Block", "Blocks", "choose_mlps", "find_blocks", "replace_modules"]

Blocks = int | str | Sequence[int] | Sequence[str]

_LEAF = re.compile(r"mlp\d?|mlp_tokens|mlp_channels|mlp_in|ffn|ffn\d|channel_mlp")
_NOT_IN = {"attn", "rel_pos", "downsample", "attn_pool", "se", "gather_excite", "fc_norm"}
_ONE_TOKEN = ("blocks_token_only", "cls_attn_blocks", "post_network")


@dataclass(frozen=True)
class Block:
    """A numbered block, the stage it is in ("" where there are none), and its MLPs by their names in the model."""

    name: str
    stage: str
    mlps: dict[str, nn.Module]


def find_blocks(model: nn.Module) -> list[Block]:
    """The blocks with an MLP, dense or sparse, in the model's order."""
    blocks: dict[str, Block] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        parts = name.split(".")
        numbers = [i for i, part in enumerate(parts) if part.isdigit()]
        if not numbers or numbers[-1] == len(parts) - 1 or parts[0] in _ONE_TOKEN:
            continue
        if not _LEAF.fullmatch(parts[-1]) or _NOT_IN & set(parts):
            continue
        block = ".".join(parts[: numbers[-1] + 1])
        stage = ".".join(parts[: numbers[0] + 1]) if len(numbers) > 1 else ""
        blocks.setdefault(block, Block(block, stage, {})).mlps[name] = module
    return list(blocks.values())


def choose_mlps(model: nn.Module, blocks: Blocks) -> dict[str, nn.Module]:
    """The MLPs of the blocks that are meant, by name.

    `blocks`: a number n for the last n; indices, from the end if negative; "every-n", every n-th block (V-MoE has
    every 2nd); "last-n", every second block from the end, n of them (V-MoE), or of a model in stages the last block of
    each of the last n (Swin-MoE has stages 3 and 4); names of blocks or of MLPs. ValueError for a model without MLPs
    and for blocks that it does not have.
    """
    found = find_blocks(model)
    if not any(_is_mlp(mlp) for block in found for mlp in block.mlps.values()):
        raise ValueError(_no_mlps(model, found))
    names = [blocks] if isinstance(blocks, str) else blocks
    if not isinstance(names, int) and any(isinstance(one, str) for one in names):
        pattern = re.fullmatch(r"(last|every)-(\d+)", str(names[0])) if len(names) == 1 else None
        if pattern is None:
            return _by_name(found, [str(name) for name in names])
        places = _last(found, int(pattern[2])) if pattern[1] == "last" else _every(found, int(pattern[2]))
    else:
        places = _by_number(found, names)  # type: ignore[arg-type]
    return {name: mlp for place in places for name, mlp in found[place].mlps.items()}


def replace_modules(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Put other modules in the places of these names."""
    for name, module in modules.items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, module)


def _is_mlp(module: nn.Module) -> bool:
    from sparse_mlp.moe import MoeMlp

    try:
        read_mlp(module)
    except ValueError:
        return isinstance(module, MoeMlp)
    return True


def _no_mlps(model: nn.Module, found: list[Block]) -> str:
    what = f"{type(model).__name__} has no MLPs that experts can stand for"
    for block in found:
        for name, mlp in block.mlps.items():
            try:
                read_mlp(mlp)
            except ValueError as error:
                return f"{what}: {name}: {error}"
    return f"{what}: no block of it has a module called mlp"


def _last(found: list[Block], count: int) -> list[int]:
    stages = {block.stage: place for place, block in enumerate(found)}  # the last block of each
    places = list(stages.values()) if len(stages) > 1 else list(range(len(found) - 1, -1, -2))[::-1]
    if not 0 < count <= len(places):
        raise ValueError(f'blocks "last-{count}" does not fit: there are {len(places)} such blocks')
    return places[-count:]


def _every(found: list[Block], step: int) -> list[int]:
    if not 0 < step <= len(found):
        raise ValueError(f'blocks "every-{step}" does not fit a model of {len(found)} blocks')
    return list(range(step - 1, len(found), step))


def _by_number(found: list[Block], numbers: int | Sequence[int]) -> list[int]:
    if isinstance(numbers, int):
        if not 0 < numbers <= len(found):
            raise ValueError(
                f"blocks {numbers} does not fit a model of {len(found)} blocks; [{numbers}] is one of them"
            )
        return list(range(len(found) - numbers, len(found)))
    wrong = [i for i in numbers if not -len(found) <= i < len(found)]
    if wrong or not numbers:
        what = f"there is no block {wrong[0]}" if wrong else "blocks is empty"
        raise ValueError(f"{what}: the model has {len(found)}, 0 to {len(found) - 1}")
    return sorted({i % len(found) for i in numbers})


def _by_name(found: list[Block], names: Sequence[str]) -> dict[str, nn.Module]:
    known = {block.name: block.mlps for block in found}
    known |= {name: {name: mlp} for block in found for name, mlp in block.mlps.items()}
    chosen: dict[str, nn.Module] = {}
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0) or [found[-1].name]
            raise ValueError(f'there is no block {name!r}; nearest: {near[0]} (or a number, "last-2", "every-2")')
        chosen |= known[name]
    return chosen
