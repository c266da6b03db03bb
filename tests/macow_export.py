"""A MaCow under the names of its authors' program: the way back of what `convert` reads."""

import re

import torch
from torch import Tensor

from exactflow.models.macow.model import MaCow, MaCowConfig
from exactflow.models.macow.published import _PARTS

_RULES: tuple[tuple[str, str], ...] = (
    (r"^dequantizer\.flow\.", "dequant_flow.macow."),
    (r"^dequantizer\.encoder\.", "dequant_flow.encoder."),
    (r"\.levels\.(\d+)\.runs\.", r".blocks.\1.layers."),
    (r"\.levels\.(\d+)\.priors\.", r".blocks.\1.priors."),
    *((rf"(\.units\.\d+)\.parts\.{index}\.", rf"\1.{name}.") for name, index in _PARTS.items()),
    (r"(\.conv\d)\.network\.conv\.", r"\1.net.masked_conv.conv."),
    (r"(\.conv\d)\.network\.output\.", r"\1.net.conv1x1.conv."),
    (r"(\.conv\d)\.network\.context\.", r"\1.s_conv.conv."),
    (r"\.glow\.coupling\.network\.(conv\d)\.", r".glow.coupling.net.\1.conv."),
    (r"\.coupling\.network\.(conv\d)\.", r".nice.net.\1.conv."),
    (r"\.glow\.", ".glow_step."),
    (r"\.mixing\.weight$", ".conv1x1.weight"),
    (r"\.bottom\.(\d+)\.", r".resnet_bottom.main.\1."),
    (r"\.residual\.(\d+)\.", r".resnet\1.main."),
    (r"(\.main\.\d+\.conv[12])\.", r"\1.conv."),
    (r"\.shortcut\.", ".downsample.conv."),
    (r"\.down\.(\d+)\.", r".down\1.conv."),
    (r"\.up\.(\d+)\.", r".up\1.deconv."),
    (r"\.encoder\.output\.", ".encoder.s_level.conv."),
    (r"\.gain$", ".weight_g"),
    (r"\.direction$", ".weight_v"),
)


def to_published(model: MaCow) -> dict[str, Tensor]:
    """The state dict of `model` under the published names, with the inverses it keeps."""
    found: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        if name == "initialized":
            continue
        key = published_name(name, model.config)
        found[key] = value.clone()
        if key.endswith(".conv1x1.weight"):
            found[f"{key}_inv"] = torch.linalg.inv(value)
    return found


def published_name(name: str, config: MaCowConfig) -> str:
    """The published name of one here."""
    for pattern, replacement in _RULES:
        name = re.sub(pattern, replacement, name)
    main = config.steps if name.startswith("flow.") else config.dequantizer_steps
    for edge in {0, len(main) - 1}:
        name = name.replace(f".blocks.{edge}.layers.0.", f".blocks.{edge}.steps.")
    return name
