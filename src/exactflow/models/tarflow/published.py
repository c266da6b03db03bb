"""The published TarFlow state dict: its names, and the configuration that its shapes tell.

Everything about the architecture is taken from names and shapes of the tensors, and from the file
name where these are silent (specification, section 8).
"""

import math
import re
import warnings
from collections.abc import Mapping

import torch
from torch import Tensor

from exactflow.models.foreign import ForeignFile, Hints, PublishedFiles
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
_FILE = re.compile(
    r"model_(?P<patch>\d+)_(?P<width>\d+)_(?P<blocks>\d+)_(?P<layers>\d+)_(?P<noise>[\d.]+|uniform)$"
)
_HEAD_DIM = 64  # not recorded in the file; the published models have no other


def from_published(
    state: Mapping[str, Tensor],
    name: str,
    *,
    channels: int | None = None,
    height: int | None = None,
    noise_std: float | None = None,
) -> TarFlow:
    """The model of a published state dict, in evaluation mode.

    Args:
        state: tensors by published name.
        name: of the file, without its ending: it may tell the training noise.
        channels: image channels, where neither 3 nor 1 fits the weights uniquely.
        height: image height in pixels, for images that are not square.
        noise_std: training noise, 0 for uniform; read off `name` where absent, and taken as
            uniform, with a warning, where that is silent too.

    Raises:
        ValueError: for anything else, with what was expected.
    """
    required = ("blocks.0.pos_embed", "blocks.0.proj_in.weight", "blocks.0.proj_out.weight")
    missing = [key for key in required if key not in state]
    if missing:
        raise ValueError(
            f"{name} is not a TarFlow checkpoint: it has no {missing[0]!r} "
            f"(its first keys: {list(state)[:3]})"
        )
    config = _config(name, state, channels, height, noise_std)
    with torch.device("meta"):
        model = TarFlow(config)
    renamed = {_rename(k): _reshape(k, v) for k, v in state.items() if not k.endswith("attn_mask")}
    try:
        model.load_state_dict(renamed, assign=True)
    except RuntimeError as error:
        raise ValueError(f"{name} is not a complete TarFlow checkpoint: {error}") from error
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return model.eval()


def _config(
    name: str,
    state: Mapping[str, Tensor],
    channels: int | None,
    height: int | None,
    noise_std: float | None,
) -> TarFlowConfig:
    """Architecture from the weights; patch and noise cross-checked with the file name."""
    named = _FILE.search(name)
    tokens, token_dim = state["var"].shape
    width = state["blocks.0.proj_in.weight"].shape[0]
    outputs = state["blocks.0.proj_out.weight"].shape[0]
    if outputs not in (token_dim, 2 * token_dim) or width % _HEAD_DIM:
        raise ValueError(
            f"{name}: expected {token_dim} or {2 * token_dim} outputs and a width that is a "
            f"multiple of {_HEAD_DIM}, got {outputs} and {width}"
        )
    if channels is None:
        channels = next((c for c in (3, 1) if _is_square(token_dim / c)), None)
    if channels is None or not _is_square(token_dim / channels):
        raise ValueError(
            f"{name}: tokens of {token_dim} numbers are not channels x patch x patch for "
            f"{channels or '3 or 1'} channels; give channels="
        )
    patch = math.isqrt(token_dim // channels)
    rows = height // patch if height else math.isqrt(tokens)
    if rows == 0 or tokens % rows or (height is None and rows**2 != tokens):
        raise ValueError(
            f"{name}: {tokens} tokens of side {patch} are no square image; give height="
        )
    blocks = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks."))
    layers = {key.split(".")[3] for key in state if key.startswith("blocks.0.attn_blocks.")}
    if named:
        read = (patch, width, blocks, len(layers))
        told = tuple(int(named[part]) for part in ("patch", "width", "blocks", "layers"))
        if read != told:
            raise ValueError(
                f"{name}: the file name says patch, width, blocks, layers = {told}, "
                f"the weights say {read}"
            )
        if noise_std is None:
            noise_std = 0.0 if named["noise"] == "uniform" else float(named["noise"])
    if noise_std is None:  # a valid reading: any density scores dequantised images
        noise_std = 0.0
        warnings.warn(
            f"{name}: neither weights nor file name tell the training noise; "
            "taken as uniform dequantisation, give noise_std= if it was Gaussian",
            stacklevel=6,  # whoever called `convert`
        )
    embedding = state.get("blocks.0.class_embed")
    return TarFlowConfig(
        image_shape=(channels, rows * patch, tokens // rows * patch),
        patch_size=patch,
        width=width,
        blocks=blocks,
        layers_per_block=len(layers),
        head_dim=_HEAD_DIM,
        num_classes=0 if embedding is None else embedding.shape[0],
        volume_preserving=outputs == token_dim,
        noise_std=noise_std,
    )


def _is_square(number: float) -> bool:
    return number.is_integer() and math.isqrt(int(number)) ** 2 == int(number)


def _rename(key: str) -> str:
    for pattern, replacement in _NAMES:
        key = re.sub(pattern, replacement, key)
    return key


def _reshape(key: str, value: Tensor) -> Tensor:
    return value.squeeze(1) if key.endswith("class_embed") else value


def _read(file: ForeignFile, hints: Hints) -> TarFlow:
    return from_published(file.weights, file.path.stem, **hints)


FILES = PublishedFiles("TarFlow", MARK, _read, takes=("channels", "height", "noise_std"))
