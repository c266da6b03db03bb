"""Checkpoints of MaskDiT's trainer, read into this library's model: arXiv 2306.09305, its code.

A file holds averaged weights under "ema" beside "model"; names begin with "model.", in files of a
compiled network with "_orig_mod.model.". Attention heads are not in it.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from exactflow.models.foreign import ForeignFile, Hints, PublishedFiles, filled
from exactflow.models.maskdit.model import MaskDiT, MaskDiTConfig

MARK = "model.decoder_pos_embed"  # a key that no other family has
HEADS = ("num_heads", "decoder_heads")
_BLOCK = {  # theirs -> ours, of a block
    "attn.qkv": "qkv",
    "attn.proj": "proj",
    "mlp.fc1": "expand",
    "mlp.fc2": "contract",
    "adaLN_modulation.1": "modulation",
}
_NAMES = {  # theirs -> ours, of what stands outside of blocks
    "x_embedder.proj": "patch",
    "t_embedder.mlp.0": "time_in",
    "t_embedder.mlp.2": "time_out",
    "decoder_layer.linear": "bridge",
    "decoder_layer.adaLN_modulation.1": "bridge_modulation",
    "final_layer.linear": "output",
    "final_layer.adaLN_modulation.1": "modulation",
}


def from_published(state: Mapping[str, Tensor], *, num_heads: int, decoder_heads: int) -> MaskDiT:
    """The model of a published state dict, in evaluation mode, float32.

    Args:
        state: tensors by their published names.
        num_heads: of the encoder's attention; 16 in the published models.
        decoder_heads: of the decoder's; 16 in the published models.

    Raises:
        ValueError: it is no whole state dict of a MaskDiT.
    """
    weights = {name.removeprefix("model."): value for name, value in state.items()}
    kernel, table = weights["x_embedder.proj.weight"], weights.get(_TABLE)
    side, channels = kernel.shape[2], kernel.shape[1]
    size = math.isqrt(weights["pos_embed"].shape[1]) * side
    config = MaskDiTConfig(
        image_shape=(channels, size, size),
        patch_size=side,
        width=kernel.shape[0],
        depth=_count(weights, "blocks"),
        num_heads=num_heads,
        decoder_width=weights["mask_token"].shape[-1],
        decoder_depth=_count(weights, "decoder_blocks"),
        decoder_heads=decoder_heads,
        num_classes=0 if table is None else table.shape[1],
    )
    ours = dict(_renamed(name, value, side) for name, value in weights.items())
    copied = {f"network.{k}": value.to(torch.float32, copy=True) for k, value in ours.items()}
    return filled(MaskDiT, config, copied)


_TABLE = "y_embedder.embedding_table.weight"


def _count(weights: Mapping[str, Tensor], blocks: str) -> int:
    return len({name.split(".")[1] for name in weights if name.startswith(f"{blocks}.")})


def _renamed(name: str, value: Tensor, side: int) -> tuple[str, Tensor]:
    """Name and layout of a tensor in `MaskedTransformer`."""
    if name in ("pos_embed", "decoder_pos_embed"):
        return name.replace("pos_embed", "position"), value[0]
    if name == "mask_token":
        return name, value[0, 0]
    if name == _TABLE:
        return "label.weight", value.T
    stem, _, kind = name.rpartition(".")
    if stem == "x_embedder.proj" and kind == "weight":
        value = value.flatten(1)
    if stem == "final_layer.linear":  # theirs: row, column, colour; here: colour, row, column
        value = value.unflatten(0, (side, side, -1)).movedim(2, 0).flatten(0, 2)
    for theirs, ours in (("blocks.", "encoder"), ("decoder_blocks.", "decoder")):
        if stem.startswith(theirs):
            index, _, part = stem.removeprefix(theirs).partition(".")
            return f"{ours}.{index}.{_BLOCK.get(part, part)}.{kind}", value
    return f"{_NAMES.get(stem, stem)}.{kind}", value


def _read(file: ForeignFile, hints: Hints) -> MaskDiT:
    return from_published(file.weights, **{name: hints[name] for name in HEADS})


FILES = PublishedFiles("MaskDiT", MARK, _read, needs=HEADS)
