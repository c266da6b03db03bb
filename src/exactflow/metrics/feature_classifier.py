"""A small classifier of the images under study, for the features of its last hidden layer."""

import hashlib
import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from exactflow.core.files import write_atomically
from exactflow.core.grey_levels import center
from exactflow.core.progress import tracked
from exactflow.core.randomness import derive_seed
from exactflow.data.datasets import ImageDataset

HIDDEN = 128  # features
_SMALLEST, _LARGEST = 4, 32  # pixels a side that the network sees
_STEPS, _BATCH, _RATE, _DECAY, _SMOOTHING = 600, 128, 5e-3, 0.05, 0.1  # of its training
_RECIPE = f"32-64-128-{HIDDEN}, {_STEPS} x {_BATCH}, AdamW {_RATE} {_DECAY} {_SMOOTHING}"


def trained_classifier(
    dataset: ImageDataset, cache_dir: Path, seed: int, *, progress: bool = False
) -> nn.Sequential:
    """The network, trained or read from `cache_dir`, in evaluation mode; see `classifier`.

    Its layers but the last give the features, (n, HIDDEN), of `prepared` images.
    """
    if dataset.labels is None or dataset.split != "train":
        labels = "no labels" if dataset.labels is None else "labels"
        raise ValueError(
            f"expected a labelled training split to train a classifier on, "
            f"got {dataset.id}, {dataset.split}, with {labels}"
        )
    if min(dataset.event_shape[1:]) < _SMALLEST:
        raise ValueError(
            f"expected images of at least {_SMALLEST} pixels a side, got {dataset.event_shape}"
        )
    recipe = hashlib.sha256(f"{_RECIPE} {seed}".encode()).hexdigest()
    path = cache_dir / f"cnn-{dataset.fingerprint[:16]}-{recipe[:16]}.safetensors"
    network = _network(dataset.event_shape[0], dataset.num_classes, seed)
    if path.is_file():
        try:
            network.load_state_dict(safetensors.torch.load_file(path))
        except (safetensors.SafetensorError, RuntimeError) as error:
            raise ValueError(f"{path} does not hold the classifier's weights: {error}") from error
    else:
        _train(network, dataset, seed, progress)
        cache_dir.mkdir(parents=True, exist_ok=True)
        write_atomically(path, weights_of(network))
    return network.requires_grad_(False).eval()


def weights_of(network: nn.Sequential) -> bytes:
    """The weights as a file of safetensors."""
    return safetensors.torch.save({k: v.contiguous() for k, v in network.state_dict().items()})


def _network(channels: int, classes: int, seed: int) -> nn.Sequential:
    """Three convolutions at a half, a half and a quarter of the size; two linear maps."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "classifier"))
        return nn.Sequential(
            *_convolution(channels, 32, kernel=4, stride=2),
            *_convolution(32, 64, kernel=3, stride=1),
            nn.MaxPool2d(2),
            *_convolution(64, 128, kernel=3, stride=1),
            nn.AdaptiveMaxPool2d(2),
            nn.Flatten(),
            nn.Linear(4 * 128, HIDDEN),
            nn.ReLU(),
            nn.Linear(HIDDEN, classes),
        )


def _convolution(inputs: int, outputs: int, *, kernel: int, stride: int) -> list[nn.Module]:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=1, bias=False)
    return [conv, nn.BatchNorm2d(outputs), nn.ReLU()]


def _train(network: nn.Sequential, dataset: ImageDataset, seed: int, progress: bool) -> None:
    """Cross-entropy with smoothed labels, AdamW with one cycle of its rate."""
    optimizer = torch.optim.AdamW(network.parameters(), _RATE, weight_decay=_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, _RATE, total_steps=_STEPS, pct_start=0.25
    )
    steps = itertools.islice(_batches(dataset, seed), _STEPS)
    for rows in tracked(steps, _STEPS, "classifier", shown=progress, unit="steps"):
        images, labels = dataset.tensors(rows)
        assert labels is not None
        logits = network(prepared(images, dataset.levels))
        loss = F.cross_entropy(logits, labels, label_smoothing=_SMOOTHING)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()


def _batches(dataset: ImageDataset, seed: int) -> Iterator[np.ndarray]:
    """Rows of each step: orders of the whole set, one after the other."""
    count = len(dataset)
    size = min(_BATCH, count)
    for epoch in itertools.count():
        order = dataset.epoch_order(derive_seed(seed, "classifier"), epoch)
        for start in range(0, count - size + 1, size):
            yield order[start : start + size]


def prepared(
    images: UInt8[Tensor, "n channels height width"], levels: int
) -> Float[Tensor, "n channels h w"]:
    """Images as the network takes them: in [-1, 1], averaged down to 32 pixels a side."""
    x = center(images, levels)
    height, width = (min(size, _LARGEST) for size in x.shape[2:])
    if (height, width) != tuple(x.shape[2:]):
        x = F.adaptive_avg_pool2d(x, (height, width))
    return x.contiguous(memory_format=torch.channels_last)  # half the time on a processor
