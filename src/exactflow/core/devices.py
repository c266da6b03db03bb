"""Where to compute, by name."""

import torch


def pick_device(name: str) -> torch.device:
    """The device; "auto" is the accelerator, if any. Raises ValueError for one that is absent."""
    if name == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return accelerator or torch.device("cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("expected a CUDA device, found none: --device cpu")
    if name == "mps" and not torch.backends.mps.is_available():
        raise ValueError("expected an MPS device, found none: --device cpu")
    return torch.device(name)
