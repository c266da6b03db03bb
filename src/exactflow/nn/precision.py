"""Where reduced precision may not reach."""

import torch


def full_precision(device: torch.device) -> torch.autocast:
    """Autocast off inside, for tensors on `device`.

    PyTorch knows no autocast of the meta device: there the CPU's stands for it.
    """
    return torch.autocast("cpu" if device.type == "meta" else device.type, enabled=False)
