"""Arguments of a compiled step: sizes and addresses, as C lays them out."""

import ctypes
from typing import final


@final
class Layer(ctypes.Structure):
    """Addresses of a layer's weights and of its cache."""

    _fields_ = tuple(
        (name, ctypes.c_ssize_t)
        for name in (
            *("attention_scale", "attention_offset", "qkv", "qkv_bias", "proj", "proj_bias"),
            *("mlp_scale", "mlp_offset", "expand", "expand_bias", "contract", "contract_bias"),
            "cache",
        )
    )


@final
class Call(ctypes.Structure):
    """Sizes, and addresses of everything else, 0 where there is none; strides count elements."""

    _fields_ = tuple(
        (name, ctypes.c_ssize_t)
        for name in (
            *("batch", "length", "dim", "heads", "head_dim", "out", "depth", "panel"),
            *("layers", "input", "input_bias", "norm", "output", "output_bias"),
            *("x", "h", "y", "qkv", "change", "wide", "logits", "raw"),
            *("tokens", "tokens_row", "tokens_column"),
            *("condition", "condition_row", "condition_column", "temperature", "position"),
            *("by_samples", "rank", "ranks", "barrier"),  # the last three: functions of OpenMP
        )
    )
