"""HDiT checkpoints of k-diffusion, read into this library's model.

A training checkpoint (.pth) is {config, model, model_ema, ...}; a slim one (.safetensors) holds the
averaged weights alone, mostly in float16, with the same configuration in its metadata. Names of
tensors are those of `HourglassTransformer`; the random Fourier features belong to the weights.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from exactflow.core.config import checked
from exactflow.models.foreign import (
    SIZE,
    ForeignFile,
    Hints,
    PublishedFiles,
    filled,
    size_in,
    without_size,
)
from exactflow.models.hdit.model import HDiT, HDiTConfig

MODEL_TYPE = "image_transformer_v2"
MARK = "patch_in.proj.weight"  # a key that no other family has
HINTS = (  # fields of `HDiTConfig` that bare weights do not hold, the image's shape aside
    "attention",
    "kernel_size",
    "window_size",
    "sigma_data",
    "weighting",
    "dropout",
    "label_dropout",
    "sigma_min",
    "sigma_max",
    "low_resolution",
    "min_snr_gamma",
    "levels",
)
_REACH = {  # kind of attention -> the field that says how far it reaches, its usual value
    "neighborhood": ("kernel_size", 7),
    "shifted-window": ("window_size", 8),
}
_UNRECORDED = {  # what bare weights do not tell -> an example of how to say it
    "image_shape": "(3, 256, 256)",
    "attention": "('neighborhood', 'global'), on the command line "
    "model.attention=[neighborhood,global]",
}


def from_published(
    weights: Mapping[str, Tensor],
    config: Mapping[str, Any] | None = None,
    hints: Mapping[str, Any] | None = None,
) -> HDiT:
    """The model in a k-diffusion checkpoint, in evaluation mode, float32.

    Args:
        weights: tensors by published name.
        config: the run's JSON, if the file holds it.
        hints: fields of `HDiTConfig` that the file does not tell. Bare weights need `image_shape`
            and `attention` (and `sigma_data`, `weighting` where they are not the usual ones); where
            `kernel_size` or `window_size` matters and is not given, a warning says what was taken.

    Raises:
        ValueError: a field that is missing, or one that contradicts the weights; with what was
            expected.
        KeyError: a tensor that every such checkpoint has is missing.
    """
    recorded = checked(HDiTConfig, {} if config is None else _recorded(config))
    hinted = checked(HDiTConfig, hints or {})
    said = {**recorded, **hinted}
    read = _from_weights(weights)
    for where, known, claimed in (("file says", recorded, hinted), ("weights say", read, said)):
        for name in known.keys() & claimed.keys():
            if claimed[name] != known[name]:
                raise ValueError(f"{name}: the {where} {known[name]}, not {claimed[name]}")
    for name, example in _UNRECORDED.items():
        if name not in said:
            raise ValueError(f"the file does not tell {name}: give it, such as {name}={example}")
    _assume_reach(said)
    side = math.isqrt(weights[MARK].shape[1] // said["image_shape"][0])
    own = {  # copies: tensors of a file may be in float16, and share memory
        f"network.{name}": value.to("cpu", torch.float32, copy=True)
        for name, value in weights.items()
    }
    return filled(HDiT, HDiTConfig(**{"patch_size": side, **said, **read}), own)


def _image_channels(weights: Mapping[str, Tensor]) -> int:
    """3 or 1, whichever makes tokens square patches of pixels."""
    inputs = weights[MARK].shape[1]
    for channels in (3, 1):
        if inputs == channels * math.isqrt(inputs // channels) ** 2:
            return channels
    raise ValueError(f"tokens of {inputs} numbers are no squares of 3 or 1 channels: give channels")


def _from_weights(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """The fields that names and shapes tell."""
    outer = 1 + max(
        (int(key.split(".")[1]) for key in weights if "down_levels." in key), default=-1
    )
    levels = [*(f"down_levels.{i}" for i in range(outer)), "mid_level"]
    depths = tuple(
        len({key[len(level) + 1 :].split(".")[0] for key in weights if key.startswith(f"{level}.")})
        for level in levels
    )
    feed_forward = [weights[f"{level}.0.ff.down_proj.weight"].shape for level in levels]
    heads = {
        shape[0] // len(weights[f"{level}.0.self_attn.scale"])
        for level, shape in zip(levels, feed_forward, strict=True)
        if f"{level}.0.self_attn.scale" in weights
    }
    if len(heads) > 1:
        raise ValueError(f"expected attention heads of one width, got {sorted(heads)}")
    inner = weights.get("mapping.blocks.0.down_proj.weight")
    table = weights.get("class_emb.weight")
    return {
        "depths": depths,
        "widths": tuple(shape[0] for shape in feed_forward),
        "d_ff": tuple(shape[1] for shape in feed_forward),
        "mapping_depth": len({key.split(".")[2] for key in weights if "mapping.blocks." in key}),
        "mapping_width": weights["mapping.out_norm.scale"].shape[0],
        "num_classes": 0 if table is None else len(table) - 1,
        **({"head_dim": heads.pop()} if heads else {}),
        **({} if inner is None else {"mapping_d_ff": inner.shape[1]}),
    }


def _recorded(config: Mapping[str, Any]) -> dict[str, Any]:
    """`_from_config`; ValueError where the JSON is another one."""
    try:
        return _from_config(config)
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise ValueError(
            f"expected the configuration of a run of k-diffusion, got {type(error).__name__}: "
            f"{error}"
        ) from error


def _from_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that a run's JSON tells and its weights do not."""
    model = config.get("model", {})
    if model.get("type") != MODEL_TYPE:
        raise ValueError(f"expected a model of type {MODEL_TYPE!r}, got {model.get('type')!r}")
    scales = len(model["widths"])
    default = [{"type": "neighborhood", "kernel_size": 7}] * (scales - 1) + [{"type": "global"}]
    attention = model.get("self_attns") or default
    dropout = model.get("dropout_rate", 0.0)
    return {
        "image_shape": (model["input_channels"], *model["input_size"]),
        "patch_size": model["patch_size"][0],
        "attention": tuple(kind["type"] for kind in attention),
        "dropout": tuple(dropout) if isinstance(dropout, list) else (float(dropout),) * scales,
        "sigma_data": float(model.get("sigma_data", 1.0)),
        "weighting": model.get("loss_weighting", "karras"),
        "label_dropout": float(config.get("dataset", {}).get("cond_dropout_rate", 0.1)),
        **_reach(attention),
    }


def _reach(attention: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """kernel_size and window_size, each the one value of all levels whose attention has it.

    A neighborhood whose size is not recorded has k-diffusion's own, whatever its neighbours have.
    """
    found: dict[str, int] = {}
    for kind, (name, usual) in _REACH.items():
        levels = [level for level in attention if level["type"] == kind]
        if kind == "shifted-window" and any(name not in level for level in levels):
            raise ValueError(f"expected {name} for each level of {kind} attention, got none")
        values = {level.get(name, usual) for level in levels}
        if len(values) > 1:
            raise ValueError(f"expected one {name} for all levels, got {sorted(values, key=str)}")
        if values:
            found[name] = values.pop()
    return found


def _assume_reach(said: Mapping[str, Any]) -> None:
    """Warn of sizes that neither the file nor a hint tells, and that are therefore assumed."""
    for kind, (name, usual) in _REACH.items():
        if kind in said["attention"] and name not in said:
            warnings.warn(
                f"the file does not tell {name} of its {kind} attention: took {usual}, the usual "
                f"one; give {name} to be sure",
                stacklevel=2,
            )


def _read(file: ForeignFile, hints: Hints) -> HDiT:
    fields = without_size(hints)
    if file.config is None or hints.keys() & SIZE:
        channels = hints.get("channels") or _image_channels(file.weights)
        fields["image_shape"] = (channels, *size_in(hints))
    return from_published(file.weights, file.config, fields)


FILES = PublishedFiles("HDiT", MARK, _read, takes=(*SIZE, *HINTS))
