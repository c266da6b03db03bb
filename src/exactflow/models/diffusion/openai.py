"""The networks that OpenAI published with iDDPM and ADM, read from their state dicts and back.

A published file is a flat state dict without a configuration (github.com/openai: improved-diffusion
and guided-diffusion). Widths, levels, blocks, attention, resampling and classes are read off names
and shapes; what leaves no trace there must be said.
"""

import math
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from exactflow.models.diffusion.classifier import ClassifierConfig, ClassifierUNet
from exactflow.nn.unet import Resampling, UNet, UNetConfig
from exactflow.nn.unet_parts import AttentionOrder

Network = TypeVar("Network", UNet, ClassifierUNet)

_ENDS = {  # name here -> published name, outside the stages
    "time.input": "time_embed.0",
    "time.output": "time_embed.2",
    "label": "label_emb",
    "stem": "input_blocks.0.0",
    "norm": "out.0",
    "output": "out.2",
    "pool.position": "out.2.positional_embedding",
    "pool.qkv": "out.2.qkv_proj",
    "pool.output": "out.2.c_proj",
}
_PARTS = {  # the same inside a layer
    "norm_in": "in_layers.0",
    "conv_in": "in_layers.2",
    "modulation": "emb_layers.1",
    "norm_out": "out_layers.0",
    "conv_out": "out_layers.3",
    "skip": "skip_connection",
    "norm": "norm",
    "qkv": "qkv",
    "output": "proj_out",
    "conv": "conv",
}
_CONV1D = (".qkv.weight", ".proj_out.weight", ".qkv_proj.weight", ".c_proj.weight")


def unet_of(
    state: Mapping[str, Tensor],
    *,
    num_heads: int | None,
    head_channels: int | None,
    attention_order: AttentionOrder,
    dropout: float,
) -> UNet:
    """The U-Net of a published state dict, in evaluation mode; it shares the state's memory.

    Args:
        state: as published.
        num_heads: attention heads; or else `head_channels`, the width of one.
        head_channels: see `num_heads`.
        attention_order: of the features of qkv.
        dropout: that further training is to use; it changes no output.

    Raises:
        ValueError: the state is no such U-Net's.
    """
    config = UNetConfig(
        num_heads=num_heads,
        head_channels=head_channels,
        attention_order=attention_order,
        dropout=dropout,
        **recorded(state),
    )
    with torch.device("meta"):
        network = UNet(config)
    return _filled(network, state)


def recorded(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The fields of `UNetConfig` that a published U-Net's names and shapes tell.

    Raises:
        ValueError: the state is no such U-Net's.
    """
    _check_keys(state, "U-Net", "output_blocks.0.0.in_layers.2.weight", "out.2.weight")
    resample, levels = _levels(state)
    multiples, blocks, factors = _encoder(state, levels)
    first = "input_blocks.1.0."
    modulation, convolution = first + "emb_layers.1.weight", first + "in_layers.2.weight"
    label = state.get("label_emb.weight")
    return {
        "in_channels": state["input_blocks.0.0.weight"].shape[1],
        "out_channels": state["out.2.weight"].shape[0],
        "model_channels": state["time_embed.0.weight"].shape[1],
        "channel_mult": multiples,
        "num_res_blocks": blocks,
        "attention_factors": factors,
        "scale_shift": state[modulation].shape[0] == 2 * state[convolution].shape[0],
        "resample": resample,
        "num_classes": 0 if label is None else label.shape[0],
    }


def classifier_of(state: Mapping[str, Tensor], *, head_channels: int) -> ClassifierUNet:
    """The classifier of a published state dict, in evaluation mode; it shares the state's memory.

    Args:
        state: as published, with attention pooling.
        head_channels: width of one attention head, 64 in all published classifiers.

    Raises:
        ValueError: the state is no such classifier's.
    """
    ends = ("input_blocks.0.0.weight", "out.2.positional_embedding", "out.2.c_proj.weight")
    _check_keys(state, "classifier with attention pooling", *ends)
    multiples, blocks, factors = _encoder(state, _classifier_levels(state))
    side = math.isqrt(state["out.2.positional_embedding"].shape[1] - 1)
    config = ClassifierConfig(
        image_size=side * 2 ** (len(multiples) - 1),
        num_classes=state["out.2.c_proj.weight"].shape[0],
        in_channels=state["input_blocks.0.0.weight"].shape[1],
        model_channels=state["time_embed.0.weight"].shape[1],
        channel_mult=multiples,
        num_res_blocks=blocks,
        attention_factors=factors,
        head_channels=head_channels,
    )
    with torch.device("meta"):
        network = ClassifierUNet(config)
    return _filled(network, state)


def to_published(network: UNet | ClassifierUNet) -> dict[str, Tensor]:
    """The network's state dict under the published names; it shares the network's memory."""
    state = {published_name(name): value for name, value in network.state_dict().items()}
    return {key: v.unsqueeze(-1) if key.endswith(_CONV1D) else v for key, v in state.items()}


def published_name(name: str) -> str:
    """The published name of a parameter."""
    match name.split("."):
        case ["down", stage, layer, part, kind]:
            part = "op" if part == "conv" else _PARTS[part]
            return f"input_blocks.{int(stage) + 1}.{layer}.{part}.{kind}"
        case ["up", stage, layer, part, kind]:
            return f"output_blocks.{stage}.{layer}.{_PARTS[part]}.{kind}"
        case ["middle", layer, part, kind]:
            return f"middle_block.{layer}.{_PARTS[part]}.{kind}"
    if name in _ENDS:
        return _ENDS[name]
    owner, _, kind = name.rpartition(".")
    return f"{_ENDS[owner]}.{kind}"


def _check_keys(state: Mapping[str, Tensor], what: str, *keys: str) -> None:
    for key in ("time_embed.0.weight", "input_blocks.1.0.in_layers.2.weight", *keys):
        if key not in state:
            raise ValueError(
                f"expected the state dict of a {what} as OpenAI publishes it, got one without "
                f"{key!r} (its first keys: {list(state)[:3]})"
            )


def _levels(state: Mapping[str, Tensor]) -> tuple[Resampling, int]:
    """How a U-Net resamples, and its number of levels."""
    stages = _input_stages(state)
    convolutions = sum(f"input_blocks.{i}.0.op.weight" in state for i in range(stages))
    if convolutions:
        return "conv", convolutions + 1
    ups = [k for k in state if k.startswith("output_blocks.") and k.endswith(".in_layers.2.weight")]
    blocks = sum(key.split(".")[2] != "0" for key in ups)
    if blocks:
        return "resblock", blocks + 1
    present = {int(key.split(".")[1]) for key in state if key.startswith("input_blocks.")}
    return "plain", stages - len(present) + 1


def _classifier_levels(state: Mapping[str, Tensor]) -> int:
    """The number of levels: blocks with attention come in runs as long as a level has blocks."""
    stages = _input_stages(state)
    attending = "".join("01"[f"input_blocks.{i}.1.qkv.weight" in state] for i in range(stages))
    run = max(map(len, attending.split("0")))
    if run == 0:
        raise ValueError("expected a classifier with attention before its middle, got none")
    return stages // (run + 1)


def _encoder(
    state: Mapping[str, Tensor], levels: int
) -> tuple[tuple[float, ...], int, tuple[int, ...]]:
    """Channel multiples, residual blocks per level, and the factors of levels with attention."""
    stages = _input_stages(state)
    if stages % levels or stages == levels:
        raise ValueError(f"expected {levels} levels of equal depth, got {stages} input blocks")
    period = stages // levels  # a level's blocks, and the stem or the way down before them
    starts = [1 + level * period for level in range(levels)]
    kernels = [f"input_blocks.{start}.0.in_layers.2.weight" for start in starts]
    attention = [f"input_blocks.{start}.1.qkv.weight" in state for start in starts]
    absent = [key for key in kernels if key not in state]
    if absent:
        raise ValueError(f"expected {levels} levels of {period - 1} blocks, got no {absent[0]!r}")
    width = state["time_embed.0.weight"].shape[1]
    multiples = tuple(state[key].shape[0] / width for key in kernels)
    return multiples, period - 1, tuple(2**i for i, found in enumerate(attention) if found)


def _input_stages(state: Mapping[str, Tensor]) -> int:
    """Number of stages of the encoder, the stem and those without parameters included."""
    return 1 + max(int(key.split(".")[1]) for key in state if key.startswith("input_blocks."))


def _filled(network: Network, state: Mapping[str, Tensor]) -> Network:
    """The network, which is on the meta device, with the published state's tensors."""
    expected = to_published(network)
    for key in {**expected, **state}:
        shapes = [tuple(s[key].shape) if key in s else None for s in (expected, state)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"expected {key!r} of shape {shapes[0]} in a network of {network.config}, "
                f"got {shapes[1]} (None: no such tensor)"
            )
    own = {
        name: state[published_name(name)].view(value.shape)
        for name, value in network.state_dict().items()
    }
    network.load_state_dict(own, assign=True)
    return network.requires_grad_(True).eval()
