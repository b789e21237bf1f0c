"""What the original code of Stable Diffusion calls the modules of a UNet, from their names in diffusers.

The original counts through: every residual layer, downsampler and upsampler of the way down is an `input_blocks.N`, and
of the way up an `output_blocks.N`, in which 0 is the residual part, 1 the attention, and the last the upsampler.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping

_ENDS: Mapping[str, str] = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_RESIDUAL: Mapping[str, str] = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_LAYER = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.(.+)")
_MIDDLE = re.compile(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)")
_SAMPLER = re.compile(r"(down|up)_blocks\.(\d+)\.(?:down|up)samplers\.0\.conv")


def original_unet_names(modules: Iterable[str]) -> dict[str, str]:
    """The original name of each module of a UNet, by its name in diffusers.

    Args:
        modules: all modules that have weights, such as `down_blocks.0.resnets.0.conv1`.

    Returns:
        Those that the original code has too.
    """
    modules = tuple(modules)
    counts, attended = _layers(modules)
    # How many numbers the blocks before each take: a downsampler has its own, an upsampler is in the last layer's.
    starts = {
        "down": _sums({block: count + 1 for (side, block), count in counts.items() if side == "down"}, first=1),
        "up": _sums({block: count for (side, block), count in counts.items() if side == "up"}, first=0),
    }
    names = {}
    for module in modules:
        if module in _ENDS:
            names[module] = _ENDS[module]
        elif match := _LAYER.fullmatch(module):
            side, block, kind, layer, rest = match.groups()
            number = starts[side][int(block)] + int(layer)
            names[module] = f"{'input' if side == 'down' else 'output'}_blocks.{number}.{_inner(kind, rest)}"
        elif match := _MIDDLE.fullmatch(module):
            kind, layer, rest = match.groups()
            place = 1 if kind == "attentions" else 2 * int(layer)
            names[module] = f"middle_block.{place}.{_inner(kind, rest).partition('.')[2]}"
        elif match := _SAMPLER.fullmatch(module):
            side, block = match[1], int(match[2])
            number = starts[side][block] + counts[side, block]
            if side == "down":
                names[module] = f"input_blocks.{number}.0.op"
            else:
                names[module] = f"output_blocks.{number - 1}.{2 if (side, block) in attended else 1}.conv"
    return names


def _layers(modules: Iterable[str]) -> tuple[dict[tuple[str, int], int], set[tuple[str, int]]]:
    """How many residual layers each block has, and which blocks have attention."""
    matches = [match for module in modules if (match := _LAYER.fullmatch(module))]
    layers = {(match[1], int(match[2]), match[4]) for match in matches if match[3] == "resnets"}
    attended = {(match[1], int(match[2])) for match in matches if match[3] == "attentions"}
    return dict(Counter((side, block) for side, block, _ in layers)), attended


def _sums(sizes: Mapping[int, int], first: int) -> list[int]:
    """Where each block begins."""
    starts = [first]
    for block in range(len(sizes)):
        starts.append(starts[-1] + sizes[block])
    return starts


def _inner(kind: str, rest: str) -> str:
    return f"1.{rest}" if kind == "attentions" else f"0.{_RESIDUAL[rest]}"
