"""Numbers recorded from the original implementations, and how close ours must be to them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

TOLERANCE = 1e-5  # of the largest output
GOLDEN = Path(__file__).parent / "golden"  # the files that the repository carries
SHARED = GOLDEN.parents[2] / "shared" / "golden"  # all of them, beside the repository

Recorded = tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]


def golden_folder(family: str, name: str) -> Path:
    """The folder of the golden files NAME.*; the test is skipped where they are not here."""
    if (GOLDEN / family / f"{name}.json").exists():
        return GOLDEN / family
    if not (SHARED / family).exists():
        pytest.skip("the larger golden files are not here")
    return SHARED / family


def recorded(family: str, name: str, suffix: str = "pt") -> Recorded:
    """Settings, weights (empty if none were recorded) and outputs of an original."""
    folder = golden_folder(family, name)
    weights = folder / f"{name}.{suffix}"
    state = torch.load(weights, weights_only=True) if weights.exists() else {}
    expected = torch.load(folder / f"{name}.expected.pt", weights_only=True)
    return json.loads((folder / f"{name}.json").read_text()), state, expected


def close(got: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    """Equal shapes, and no difference above `tolerance` times the largest expected value."""
    assert got.shape == expected.shape
    error = float((got - expected).detach().abs().max())
    assert error <= tolerance * float(expected.abs().max())
