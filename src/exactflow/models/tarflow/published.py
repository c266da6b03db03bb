"""The published TarFlow state dict: its names, and the configuration that its shapes tell.

The architecture is read off names and shapes of the tensors; the file's name may tell the training
noise.
"""

import math
import re
import warnings
from collections.abc import Mapping

from torch import Tensor

from exactflow.models.foreign import ForeignFile, Hints, PublishedFiles, filled
from exactflow.models.tarflow.model import TarFlow, TarFlowConfig

MARK = "var"  # the prior's variance: a key that no other family has

# published name -> name here, applied in order; class tables lose their middle axis besides
_NAMES = (
    (r"^var$", "variance"),
    (r"\.pos_embed$", ".position"),
    (r"\.class_embed$", ".class_embedding"),
    (r"\.proj_in\.", ".input."),
    (r"\.proj_out\.", ".output."),
    (r"\.attn_blocks\.", ".layers."),
    (r"\.attention\.norm\.", ".attention_norm."),
    (r"\.attention\.(qkv|proj)\.", r".\1."),
    (r"\.mlp\.norm\.", ".mlp_norm."),
    (r"\.mlp\.main\.0\.", ".expand."),
    (r"\.mlp\.main\.2\.", ".contract."),
)
# patch, width, blocks, layers, noise
_FILE = re.compile(r"model_(\d+)_(\d+)_(\d+)_(\d+)_([\d.]+|uniform)$")
_HEAD_DIM = 64  # not recorded in the file; the published models have no other


def from_published(file: ForeignFile, hints: Hints) -> TarFlow:
    """The model of a published state dict, in evaluation mode.

    Args:
        file: its tensors, and its name, which may tell the training noise.
        hints: `channels` of the image, where neither 3 nor 1 fits the weights uniquely; `height` in
            pixels, for images that are not square; `noise_std`, 0 for uniform: read off the file's
            name where absent, and taken as uniform, with a warning, where that is silent too.

    Raises:
        ValueError: hints or a file name that contradict the weights; with what was expected.
        KeyError: a tensor that every such state dict has is missing.
    """
    state = file.weights
    width = state["blocks.0.proj_in.weight"].shape[0]
    outputs = state["blocks.0.proj_out.weight"].shape[0]
    _, token_dim = state["var"].shape
    if outputs not in (token_dim, 2 * token_dim) or width % _HEAD_DIM:
        raise ValueError(
            f"expected {token_dim} or {2 * token_dim} outputs and a width that is a "
            f"multiple of {_HEAD_DIM}, got {outputs} and {width}"
        )
    image_shape, patch = _sizes(state, hints.get("channels"), hints.get("height"))
    blocks = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks."))
    layers = len({key.split(".")[3] for key in state if key.startswith("blocks.0.attn_blocks.")})
    named = _noise_in_name(file.path.stem, (patch, width, blocks, layers))
    noise_std = hints.get("noise_std", named)
    if noise_std is None:  # a valid reading: any density scores dequantised images
        noise_std = 0.0
        warnings.warn(
            f"{file.path.stem}: neither weights nor file name tell the training noise; "
            "taken as uniform dequantisation, give noise_std= if it was Gaussian",
            stacklevel=4,  # whoever called `convert`
        )
    embedding = state.get("blocks.0.class_embed")
    config = TarFlowConfig(
        image_shape=image_shape,
        patch_size=patch,
        width=width,
        blocks=blocks,
        layers_per_block=layers,
        head_dim=_HEAD_DIM,
        num_classes=0 if embedding is None else embedding.shape[0],
        volume_preserving=outputs == token_dim,
        noise_std=noise_std,
    )
    return filled(TarFlow, config, _renamed(state))


def _sizes(
    state: Mapping[str, Tensor], channels: int | None, height: int | None
) -> tuple[tuple[int, int, int], int]:
    """Shape of the image, and side of a patch."""
    tokens, token_dim = state["var"].shape
    if channels is None:
        channels = next((c for c in (3, 1) if _is_square(token_dim / c)), None)
    if channels is None or not _is_square(token_dim / channels):
        raise ValueError(
            f"tokens of {token_dim} numbers are not channels x patch x patch for "
            f"{channels or '3 or 1'} channels; give channels="
        )
    patch = math.isqrt(token_dim // channels)
    rows = height // patch if height else math.isqrt(tokens)
    if rows == 0 or tokens % rows or (height is None and rows**2 != tokens):
        raise ValueError(f"{tokens} tokens of side {patch} are no square image; give height=")
    return (channels, rows * patch, tokens // rows * patch), patch


def _noise_in_name(name: str, read: tuple[int, int, int, int]) -> float | None:
    """The training noise that a file's name tells, whose sizes must be those of the weights."""
    named = _FILE.search(name)
    if named is None:
        return None
    *sizes, noise = named.groups()
    told = tuple(map(int, sizes))
    if read != told:
        raise ValueError(
            f"the file name says patch, width, blocks, layers = {told}, the weights say {read}"
        )
    return 0.0 if noise == "uniform" else float(noise)


def _is_square(number: float) -> bool:
    return number.is_integer() and math.isqrt(int(number)) ** 2 == int(number)


def _renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under their names here; the masks are no weights."""
    found = {}
    for key, value in state.items():
        name = key
        for pattern, replacement in _NAMES:
            name = re.sub(pattern, replacement, name)
        if not key.endswith("attn_mask"):
            found[name] = value.squeeze(1) if key.endswith("class_embed") else value
    return found


FILES = PublishedFiles("TarFlow", MARK, from_published, takes=("channels", "height", "noise_std"))
