"""The published MaCow state dict: its names, its layout, and the configuration it is silent about.

Names are those of the old weight normalisation (weight_g, weight_v) or of the parametrised one.
"""

import re
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from exactflow.models.foreign import ForeignFile, Hints, PublishedFiles, filled, size_in
from exactflow.models.macow.config import MaCowConfig, Steps
from exactflow.models.macow.model import MaCow

MARK = "flow.blocks.0.steps.0.glow_step.actnorm.bias"  # a key that no other family has
_PARTS = {"actnorm1": 0, "conv1": 1, "conv2": 2, "actnorm2": 3, "conv3": 4, "conv4": 5}
_UP = re.compile(r"^dequant_flow\.encoder\.up(\d+)\.")
# Published name -> name here; every rule is applied to every key, in order.
_RULES: tuple[tuple[str, str], ...] = (
    (r"^dequant_flow\.macow\.", "dequantizer.flow."),
    (r"^dequant_flow\.encoder\.", "dequantizer.encoder."),
    (r"\.blocks\.(\d+)\.steps\.(\d+)\.", r".levels.\1.runs.0.\2."),
    (r"\.blocks\.(\d+)\.layers\.", r".levels.\1.runs."),
    (r"\.blocks\.(\d+)\.priors\.", r".levels.\1.priors."),
    *((rf"(\.units\.\d+)\.{name}\.", rf"\1.parts.{index}.") for name, index in _PARTS.items()),
    (r"\.net\.masked_conv\.conv\.", ".network.conv."),
    (r"\.net\.conv1x1\.conv\.", ".network.output."),
    (r"\.s_conv\.conv\.", ".network.context."),
    (r"\.glow_step\.", ".glow."),
    (r"\.conv1x1\.weight$", ".mixing.weight"),
    (r"\.(?:nice|coupling)\.net\.(conv\d)\.conv\.", r".coupling.network.\1."),
    (r"\.resnet_bottom\.main\.", ".bottom."),
    (r"\.resnet(\d+)\.main\.", r".residual.\1."),
    (r"\.down(\d+)\.conv\.", r".down.\1."),
    (r"\.up(\d+)\.deconv\.", r".up.\1."),
    (r"\.s_level\.conv\.", ".output."),
    (r"\.downsample\.conv\.", ".shortcut."),
    (r"(\.conv[12])\.conv\.", r"\1."),
    (r"\.(?:weight_g|parametrizations\.weight\.original0)$", ".gain"),
    (r"\.(?:weight_v|parametrizations\.weight\.original1)$", ".direction"),
)


def from_published(state: Mapping[str, Tensor], size: tuple[int, int], levels: int) -> MaCow:
    """The model of a published state dict, in evaluation mode.

    Args:
        state: tensors by published name.
        size: height and width; weights tell nothing of it.
        levels: grey levels, 2 ** n_bits.

    Raises:
        ValueError: tensors are missing, left over or of another shape.
        KeyError: a tensor that every such state dict has is missing.
    """
    own = {
        _rename(key): value.clone()
        for key, value in _deepest_first(state).items()
        if not key.endswith("weight_inv")
    }
    own["initialized"] = torch.tensor(True)
    return filled(MaCow, published_config(state, size, levels), own)


def published_config(
    state: Mapping[str, Tensor], size: tuple[int, int], levels: int
) -> MaCowConfig:
    """The configuration that the names and shapes of a published state dict tell."""
    image_shape = (len(state[MARK]), *size)
    steps, hidden, kernel, factor = _architecture(state, "flow", image_shape[0])
    first = "flow.blocks.0.steps.0.units.0.conv1.net"
    additive = _outputs(state, f"{first}.conv1x1.conv") == image_shape[0]
    config = MaCowConfig(image_shape, steps, hidden, kernel, factor, additive, levels=levels)
    if len(steps) > 2:
        moved = 4 * image_shape[0] // factor
        prior = _outputs(state, "flow.blocks.1.priors.0.nice.net.conv3.conv")
        config = replace(config, additive_prior=prior == moved)
    if not any(key.startswith("dequant_flow.") for key in state):
        return config
    steps, hidden, kernel, factor = _architecture(state, "dequant_flow.macow", image_shape[0])
    return replace(
        config,
        dequantization="variational",
        dequantizer_steps=steps,
        dequantizer_hidden=hidden,
        dequantizer_kernel=kernel,
        dequantizer_factor=factor,
        context=_outputs(state, "dequant_flow.encoder.s_level.conv"),
    )


def _architecture(
    state: Mapping[str, Tensor], root: str, channels: int
) -> tuple[Steps, tuple[int, ...], tuple[int, int], int]:
    """Steps, hidden widths, kernel and factor of the flow under `root`."""
    pattern = re.compile(
        rf"{re.escape(root)}\.blocks\.(\d+)\.(?:steps|layers\.(\d+))\.(\d+)\.glow_step\.actnorm\.bias"
    )
    found: dict[int, dict[int, int]] = {}
    for key in state:
        if match := pattern.fullmatch(key):
            level, run = int(match[1]), int(match[2] or 0)
            runs = found.setdefault(level, {})
            runs[run] = max(runs.get(run, 0), int(match[3]) + 1)
    if not found:
        raise KeyError(f"{root}.blocks.0.steps.0")
    steps = tuple(tuple(runs[run] for run in sorted(runs)) for _, runs in sorted(found.items()))
    hidden: list[int] = []
    factor = 2  # unless a level between the first and the last says another
    for level in range(len(steps)):
        block = f"{root}.blocks.{level}"
        inner = 0 < level < len(steps) - 1
        step = f"{block}.layers.0.0" if inner else f"{block}.steps.0"
        hidden.append(_outputs(state, f"{step}.glow_step.coupling.net.conv1.conv"))
    if len(steps) > 2:  # channels of the first split level, over those of its first part
        several = len(steps[1]) > 1
        after = f"{root}.blocks.1.layers.1.0" if several else f"{root}.blocks.2"
        names = (f"{after}.{x}glow_step.actnorm.bias" for x in ("", "steps.0.", "layers.0.0."))
        left = next(len(state[n]) for n in names if n in state) // (1 if several else 4)
        factor = 4 * channels // (4 * channels - left)
    weight = _direction(state, f"{root}.blocks.0.steps.0.units.0.conv1.net.masked_conv.conv")
    return steps, tuple(hidden), (weight.shape[2], weight.shape[3]), factor


def _outputs(state: Mapping[str, Tensor], conv: str) -> int:
    """Output channels of a convolution."""
    return state[f"{conv}.bias"].shape[0]


def _direction(state: Mapping[str, Tensor], conv: str) -> Tensor:
    new = f"{conv}.parametrizations.weight.original1"
    return state[new] if new in state else state[f"{conv}.weight_v"]


def _rename(key: str) -> str:
    """The name here of a published one."""
    for pattern, replacement in _RULES:
        key = re.sub(pattern, replacement, key)
    return key


def _deepest_first(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The encoder's upward convolutions numbered from the coarsest on, whichever way they were."""
    ups = {match[1] for key in state if (match := _UP.match(key))}
    inputs = {k: len(_direction(state, f"dequant_flow.encoder.up{k}.deconv")) for k in ups}
    order = sorted(ups, key=lambda k: (-inputs[k], int(k)))
    place = {old: str(new) for new, old in enumerate(order)}
    return {
        _UP.sub(lambda m: f"dequant_flow.encoder.up{place[m[1]]}.", key): value
        for key, value in state.items()
    }


def _read(file: ForeignFile, hints: Hints) -> MaCow:
    return from_published(file.weights, size_in(hints), hints["levels"])


FILES = PublishedFiles("MaCow", MARK, _read, needs=("height", "levels"), takes=("width",))
