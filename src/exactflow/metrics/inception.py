"""The Inception network of the FID, under the key names of its public weight file.

Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", arXiv 1512.00567, as
trained in December 2015: 1008 classes, and pools inside the blocks that differ from those of later
releases. Averages leave the padding out of their count, and the last block takes a maximum.
"""

import hashlib
import io
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from exactflow.core.files import write_atomically
from exactflow.data.streaming import remote

PUBLIC_FILE = "pt_inception-2015-12-05-6726825d.pth"  # 95,628,359 bytes, 566 tensors
PUBLIC_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
LARGEST_FILE = 2**28  # bytes that are read
IMAGE_SIZE = 299  # pixels a side
FEATURES = 2048
_CLASSES = 1008
_NAMED_HASH = re.compile(r"-([0-9a-f]{8,64})\.\w+$")  # PyTorch's custom for published weights

_Pool = Callable[[Tensor], Tensor]
_average = partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False)
_maximum = partial(F.max_pool2d, kernel_size=3, stride=1, padding=1)
_halve = partial(F.max_pool2d, kernel_size=3, stride=2)

_Kernel = tuple[int, int]  # rows, columns
_1X1, _3X3, _5X5 = (1, 1), (3, 3), (5, 5)
_1X7, _7X1, _1X3, _3X1 = (1, 7), (7, 1), (1, 3), (3, 1)


@final
@dataclass(frozen=True)
class _Unit:
    """A convolution, its normalisation and a ReLU."""

    name: str
    width: int
    kernel: _Kernel = _1X1
    stride: int = 1
    padded: bool = True


@final
@dataclass(frozen=True)
class _Branch:
    """A pool (or none), units one after the other, then units side by side."""

    chain: tuple[_Unit, ...]
    pool: _Pool | None = None
    fork: tuple[_Unit, ...] = ()


def _chain(name: str, *units: tuple[int, _Kernel]) -> tuple[_Unit, ...]:
    """Units `name_1`, `name_2`, ... of these widths and kernels."""
    return tuple(_Unit(f"{name}_{n}", *unit) for n, unit in enumerate(units, 1))


def _down(name: str, width: int) -> _Unit:
    """A unit that halves the image."""
    return _Unit(name, width, _3X3, stride=2, padded=False)


def _fine(pooled: int) -> tuple[_Branch, ...]:
    """A block at 35 x 35 (figure 5)."""
    return (
        _Branch((_Unit("branch1x1", 64),)),
        _Branch(_chain("branch5x5", (48, _1X1), (64, _5X5))),
        _Branch(_chain("branch3x3dbl", (64, _1X1), (96, _3X3), (96, _3X3))),
        _Branch((_Unit("branch_pool", pooled),), _average),
    )


def _middle(width: int) -> tuple[_Branch, ...]:
    """A block at 17 x 17, of rows and columns (figure 6)."""
    double = ((width, _1X1), (width, _7X1), (width, _1X7), (width, _7X1), (192, _1X7))
    return (
        _Branch((_Unit("branch1x1", 192),)),
        _Branch(_chain("branch7x7", (width, _1X1), (width, _1X7), (192, _7X1))),
        _Branch(_chain("branch7x7dbl", *double)),
        _Branch((_Unit("branch_pool", 192),), _average),
    )


def _coarse(pool: _Pool) -> tuple[_Branch, ...]:
    """A block at 8 x 8, which widens (figure 7)."""
    return (
        _Branch((_Unit("branch1x1", 320),)),
        _Branch(
            _chain("branch3x3", (384, _1X1)),
            fork=(_Unit("branch3x3_2a", 384, _1X3), _Unit("branch3x3_2b", 384, _3X1)),
        ),
        _Branch(
            _chain("branch3x3dbl", (448, _1X1), (384, _3X3)),
            fork=(_Unit("branch3x3dbl_3a", 384, _1X3), _Unit("branch3x3dbl_3b", 384, _3X1)),
        ),
        _Branch((_Unit("branch_pool", 192),), pool),
    )


_TO_MIDDLE = (  # 35 to 17 pixels
    _Branch((_down("branch3x3", 384),)),
    _Branch((*_chain("branch3x3dbl", (64, _1X1), (96, _3X3)), _down("branch3x3dbl_3", 96))),
    _Branch((), _halve),
)
_TO_COARSE = (  # 17 to 8 pixels
    _Branch((*_chain("branch3x3", (192, _1X1)), _down("branch3x3_2", 320))),
    _Branch(
        (
            *_chain("branch7x7x3", (192, _1X1), (192, _1X7), (192, _7X1)),
            _down("branch7x7x3_4", 192),
        )
    ),
    _Branch((), _halve),
)
_STEM = (
    (_down("Conv2d_1a_3x3", 32), None),
    (_Unit("Conv2d_2a_3x3", 32, _3X3, padded=False), None),
    (_Unit("Conv2d_2b_3x3", 64, _3X3), _halve),
    (_Unit("Conv2d_3b_1x1", 80), None),
    (_Unit("Conv2d_4a_3x3", 192, _3X3, padded=False), _halve),
)
_BLOCKS = {
    "Mixed_5b": _fine(32),
    "Mixed_5c": _fine(64),
    "Mixed_5d": _fine(64),
    "Mixed_6a": _TO_MIDDLE,
    "Mixed_6b": _middle(128),
    "Mixed_6c": _middle(160),
    "Mixed_6d": _middle(160),
    "Mixed_6e": _middle(192),
    "Mixed_7a": _TO_COARSE,
    "Mixed_7b": _coarse(_average),
    "Mixed_7c": _coarse(_maximum),
}


@final
class _Convolution(nn.Module):
    def __init__(self, inputs: int, unit: _Unit) -> None:
        super().__init__()
        height, width = unit.kernel
        padding = (height // 2, width // 2) if unit.padded else 0
        self.conv = nn.Conv2d(inputs, unit.width, unit.kernel, unit.stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(unit.width, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


@final
class _Block(nn.Module):
    """Branches of the same input, side by side."""

    def __init__(self, inputs: int, branches: tuple[_Branch, ...]) -> None:
        super().__init__()
        self._branches, self.width = branches, 0
        for branch in branches:
            width = inputs
            for unit in branch.chain:
                self.add_module(unit.name, _Convolution(width, unit))
                width = unit.width
            for unit in branch.fork:
                self.add_module(unit.name, _Convolution(width, unit))
            self.width += sum(unit.width for unit in branch.fork) or width

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([part for b in self._branches for part in self._run(b, x)], dim=1)

    def _run(self, branch: _Branch, x: Tensor) -> list[Tensor]:
        if branch.pool is not None:
            x = branch.pool(x)
        for unit in branch.chain:
            x = self.get_submodule(unit.name)(x)
        return [self.get_submodule(unit.name)(x) for unit in branch.fork] or [x]


@final
class Inception(nn.Module):
    """Means over positions of the last block's outputs ("pool3").

    The layer of classes is there for its keys, and is not run. In training mode the statistics of
    a batch would enter: use it in evaluation mode, as `read_inception` gives it.
    """

    def __init__(self) -> None:
        super().__init__()
        width = 3
        for unit, _ in _STEM:
            self.add_module(unit.name, _Convolution(width, unit))
            width = unit.width
        for name, branches in _BLOCKS.items():
            block = _Block(width, branches)
            self.add_module(name, block)
            width = block.width
        self.fc = nn.Linear(width, _CLASSES)

    def forward(self, x: Float[Tensor, "batch 3 299 299"]) -> Float[Tensor, "batch 2048"]:
        """Features of images in [-1, 1]."""
        for unit, pool in _STEM:
            x = self.get_submodule(unit.name)(x)
            x = x if pool is None else pool(x)
        for name in _BLOCKS:
            x = self.get_submodule(name)(x)
        return x.mean((2, 3))


def read_inception(
    path_or_url: str | Path, sha256: str | None = None, *, cache_dir: Path | None = None
) -> tuple[Inception, str]:
    """The network with the weights of a file, in evaluation mode, and the file's SHA-256 (hex).

    Args:
        path_or_url: a PyTorch file of plain tensors with the public names; or its address (https://
            or file://), from which it is fetched once.
        sha256: the file's hash, or the beginning of it; None takes the hexadecimal digits at the
            end of the file's name, where it has them (`PUBLIC_FILE` does). It is needed only for a
            file that is fetched over the network.
        cache_dir: where fetched files are kept; None is ~/.cache/exactflow.

    Raises:
        FileNotFoundError: no such file, or nothing at the address.
        ValueError: an address without encryption or without a known hash; another hash; a file that
            holds anything but these weights (which is not loaded).
    """
    text = str(path_or_url)
    found = _NAMED_HASH.search(text)
    expected = (sha256 or (found[1] if found else "")).lower()
    scheme = text.partition("://")[0].lower() if "://" in text else ""
    if scheme == "http":
        raise ValueError(f"expected Inception weights from https://, got {text}")
    if scheme == "https" and not expected:
        raise ValueError(
            f"{text}: expected to know the file's SHA-256 before it is fetched: give it as "
            f"sha256=..., or an address that ends in the beginning of it, as {PUBLIC_FILE} does"
        )
    if scheme in ("https", "file"):
        path = _fetched(text, expected, cache_dir or Path("~/.cache/exactflow").expanduser())
    else:
        path = Path(text)
    if not path.is_file():
        raise FileNotFoundError(f"expected a file of Inception weights, got {text!r}: no such file")
    if path.stat().st_size > LARGEST_FILE:
        raise ValueError(f"{path}: expected Inception weights of at most {LARGEST_FILE:,} bytes")
    content = path.read_bytes()
    digest = _checked(content, expected, str(path))
    return _network(content, str(path)), digest


def _fetched(url: str, expected: str, folder: Path) -> Path:
    """The file behind an address, kept in `folder` once its hash is right."""
    address = hashlib.sha256(url.encode()).hexdigest()[:8]
    path = folder / f"{address}-{url.rsplit('/', 1)[-1]}"
    if path.is_file():
        return path
    content = remote.read(url, LARGEST_FILE)
    if content is None:
        raise FileNotFoundError(f"expected Inception weights at {url}, found none")
    _checked(content, expected, url)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(path, content)
    return path


def _checked(content: bytes, expected: str, source: str) -> str:
    digest = hashlib.sha256(content).hexdigest()
    if not digest.startswith(expected):
        raise ValueError(
            f"{source}: expected a file whose SHA-256 begins with {expected}, got {digest} "
            f"({len(content):,} bytes): another file, or a part of it"
        )
    return digest


def _network(content: bytes, source: str) -> Inception:
    try:
        state: Any = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling foreign bytes can fail in any way
        raise ValueError(
            f"{source} is not a whole PyTorch file of plain tensors: {error}"
        ) from error
    with torch.device("meta"):
        network = Inception()
    wanted = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"{source}: expected a flat state dict of tensors")
    given = {name: tuple(value.shape) for name, value in state.items()}
    if given != wanted:
        name = min(map(str, dict(given.items() ^ wanted.items())))
        raise ValueError(
            f"{source} does not hold the FID Inception's weights: {name} is expected as "
            f"{wanted.get(name, 'absent')}, got {given.get(name, 'absent')}"
        )
    network.to_empty(device="cpu").load_state_dict(state)
    return network.requires_grad_(False).eval()
