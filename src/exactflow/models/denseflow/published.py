"""The published DenseFlow state dict: its names, and the configuration that its shapes tell."""

import math
import re
from collections.abc import Mapping

from torch import Tensor

from exactflow.models.denseflow.model import DenseFlow, DenseFlowConfig
from exactflow.models.foreign import ForeignFile, Hints, PublishedFiles, filled, size_in

MARK = "transforms.0.encoder.base_dist.loc"  # a key that no other family has

_CONSTANTS = re.compile(
    r"^transforms\.\d+\.(dist\.buffer|ldj_per_dim|_shift|_scale|encoder\.transforms\.\d+\.temperature)$"
)
# published name -> name here, applied in order
_NAMES = (
    (r"^base_dist\.(loc|log_scale)$", r"prior.\1"),
    (r"^transforms\.0\.encoder\.base_dist\.", "dequantizer."),
    (r"^transforms\.0\.encoder\.context_init\.1\.", "dequantizer.context.first."),
    (r"^transforms\.0\.encoder\.context_init\.2\.", "dequantizer.context.down."),
    (r"^transforms\.0\.encoder\.context_init\.3\.", "dequantizer.context.second."),
    (r"\bprior\.loc$", "prior_mean"),
    (r"\bprior\.log_scale$", "prior_log_scale"),
    (r"^dequantizer\.loc$", "dequantizer.mean"),
    (r"\.noise_params\.(\d+)\.transformation\.0\.", r".noise_networks.\1.widen."),
    (r"\.noise_params\.(\d+)\.transformation\.2\.", r".noise_networks.\1.output."),
    (r"\.blocks\.(\d+)\.transforms\.(\d+)\.transforms\.0\.", r".units.\1.\2.norm."),
    (r"\.blocks\.(\d+)\.transforms\.(\d+)\.transforms\.1\.", r".units.\1.\2.mix."),
    (r"\.blocks\.(\d+)\.transforms\.(\d+)\.transforms\.2\.", r".units.\1.\2.coupling."),
    (r"\.coupling_net\.0(\.dn)?\.transform\.0\.", ".network.input."),
    (r"\.coupling_net\.0(\.dn)?\.transform\.2\.", ".network.output."),
    (r"\.coupling_net\.0(\.dn)?\.transform\.1\.", ".network."),
    (r"\.mha\.qkv\.", ".attention.qkv."),
    (r"\.mha\.out_transform\.", ".attention.output."),
    (r"\.mix_conv\.0\.", ".norm."),
    (r"\.mix_conv\.2\.", ".mix."),
    (r"\.(\d+)\.nn\.0\.", r".layers.\1.pointwise."),
    (r"\.(\d+)\.nn\.2\.", r".layers.\1.spatial."),
    (r"\.\d+\.conv\.", ".gate."),
)


def renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The published weights under the names of `DenseFlow`; constants are left out."""
    return {_rename(key): value for key, value in state.items() if not _CONSTANTS.match(key)}


def from_published(state: Mapping[str, Tensor], size: tuple[int, int]) -> DenseFlow:
    """The model of a published state dict, in evaluation mode.

    Args:
        state: tensors by published name, without the surrounding `{"model": ...}`.
        size: height and width; the weights tell nothing of it.

    Raises:
        ValueError: tensors are missing, left over or of another shape.
        KeyError: a tensor that every such state dict has is missing.
    """
    # Clones: tensors of a file may share memory.
    own = {name: value.clone() for name, value in renamed(state).items()}
    return filled(DenseFlow, _config_of(state, *size), own)


def _config_of(state: Mapping[str, Tensor], height: int, width: int) -> DenseFlowConfig:
    """What the shapes of a published state dict tell, and the size, which they do not."""
    blocks = _count(state, r"^transforms\.(\d+)\.blocks\.", 3, 2)
    units, modules, widths = [], [], []
    for block in range(blocks):
        name = f"transforms.{3 + 2 * block}.blocks"
        units.append(_count(state, rf"^{name}\.(\d+)\."))
        modules.append(_count(state, rf"^{name}\.0\.transforms\.(\d+)\."))
        widths.append(len(state[f"{name}.0.transforms.0.{_NETWORK}.0.weight"]))
    first = f"transforms.3.blocks.0.transforms.0.{_NETWORK}"
    encoder = "transforms.0.encoder"
    channels = state[f"{encoder}.context_init.1.0.nn.0.weight"].shape[0]
    conditional = f"{encoder}.transforms.1.coupling_net.0.transform.1.dense"
    growth = next((value for key, value in state.items() if _INJECTED.search(key)), None)
    return DenseFlowConfig(
        image_shape=(channels, height, width),
        units=tuple(units),
        modules=tuple(modules),
        widths=tuple(widths),
        growth=1 if growth is None else len(growth) // 2,
        dense_depth=_count(state, rf"^{re.escape(first)}\.1\.dense\.(\d+)\.nn\."),
        dense_growth=len(state[f"{first}.1.dense.0.nn.2.weight"]),
        dequantizer_steps=_count(state, rf"^{encoder}\.transforms\.(\d+)\.coupling_net\.", 1, 2),
        dequantizer_width=len(state[f"{encoder}.context_init.2.weight"]),
        dequantizer_depth=_count(state, rf"^{re.escape(conditional)}\.(\d+)\.nn\."),
        dequantizer_growth=len(state[f"{conditional}.0.nn.2.weight"]),
        context_growth=len(state[f"{encoder}.context_init.1.0.nn.2.weight"]),
        levels=round(math.exp(-float(state["transforms.0.ldj_per_dim"]))),
    )


_NETWORK = "transforms.2.coupling_net.0.dn.transform"
_INJECTED = re.compile(r"\.noise_params\.\d+\.transformation\.2\.weight$")


def _count(state: Mapping[str, Tensor], pattern: str, first: int = 0, step: int = 1) -> int:
    """How many of the numbers first, first + step, ... the names have at the pattern's group."""
    found = {int(match[1]) for key in state if (match := re.search(pattern, key))}
    count = 0
    while first + count * step in found:
        count += 1
    return count


def _rename(key: str) -> str:
    match = re.match(r"^transforms\.0\.encoder\.transforms\.(\d+)\.(.*)$", key)
    if match:
        number = int(match[1])
        part = "couplings" if number % 2 else "mixes"
        key = f"dequantizer.{part}.{number // 2}.{match[2]}"
    match = re.match(r"^transforms\.(\d+)\.(noise_params|blocks)\.(.*)$", key)
    if match:
        key = f"blocks.{(int(match[1]) - 3) // 2}.{match[2]}.{match[3]}"
    for pattern, replacement in _NAMES:
        key = re.sub(pattern, replacement, key)
    return key


def _read(file: ForeignFile, hints: Hints) -> DenseFlow:
    return from_published(file.weights, size_in(hints))


FILES = PublishedFiles("DenseFlow", MARK, _read, needs=("height",), takes=("width",))
