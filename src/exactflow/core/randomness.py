"""Random numbers as a function of a seed and their purpose, not of what ran before.

A draw is named by a seed and a path of keys, such as ``generator(seed, "dequantization", image)``.
The same name gives the same numbers whatever the batch size, the number of processes or the point
at which a run was resumed, so no generator state ever has to be saved.
"""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def derive_seed(seed: int, *path: int | str) -> int:
    """A 63-bit seed for the stream named by `seed` and `path` (SHA-256 of their text)."""
    digest = hashlib.sha256(repr((int(seed), *path)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator(
    seed: int, *path: int | str, device: torch.device | str | None = None
) -> torch.Generator:
    """A fresh generator for the stream named by `seed` and `path`, on `device` (default: CPU)."""
    made = torch.Generator(device=device or "cpu")
    made.manual_seed(derive_seed(seed, *path))
    return made


def normal_rows(shape: Sequence[int], generators: Sequence[torch.Generator]) -> Tensor:
    """Standard normal noise, (len(generators), *shape), float64; row i from generators[i]."""
    return torch.stack(
        [torch.randn(*shape, generator=source, dtype=torch.float64) for source in generators]
    )


def uniform_rows(shape: Sequence[int], generators: Sequence[torch.Generator]) -> Tensor:
    """Uniform noise on [0, 1), (len(generators), *shape), float64; row i from generators[i]."""
    return torch.stack(
        [torch.rand(*shape, generator=source, dtype=torch.float64) for source in generators]
    )
