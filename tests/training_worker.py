"""A toy flow with every kind of training state, and a process that trains it and is killed.

    python training_worker.py RUN_DIR {batch,write,log} STEP

trains like `train` below and kills itself (SIGKILL) at that step: before it, while its checkpoint
is being written, or while its line of the log is.

    python training_worker.py RUN_DIR compile STEPS

trains with compiled stages: here, since checked annotations do not survive compilation.
"""

import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from torch import Tensor, nn

from exactflow.core.conditional import Affine
from exactflow.core.grey_levels import center
from exactflow.core.model import GenerativeModel
from exactflow.core.saved_run import OPTIMIZER_FILE
from exactflow.core.transform import AutoregressiveTransform, Decoding
from exactflow.data.augmentation import Augmentation
from exactflow.data.datasets import ImageDataset
from exactflow.parallel import shared_batch as batch
from exactflow.training import FitResult, Progress, TrainConfig, fit
from exactflow.training import checkpoint as disk
from exactflow.training.log import MetricsLog

SHAPE = (1, 2, 3)
TOKENS = 6
LEVELS = 4
PLAIN = TrainConfig(batch_size=8, steps=6, learning_rate=1e-2, warmup_steps=2)
EVERYTHING = TrainConfig(
    batch_size=8,
    accumulate=2,
    steps=20,
    learning_rate=3e-2,
    warmup_steps=3,
    ema_decay=0.9,
    precision="bfloat16",
    log_every=3,
    checkpoint_every=4,
)


@final
@dataclass(frozen=True)
class ToyConfig:
    num_classes: int = 0
    noise_std: float = 0.1
    dropout: float = 0.0
    volume_preserving: bool = False


@final
class ToyStage(AutoregressiveTransform):
    """Shift and log-scale are strictly triangular linear maps of the pixels."""

    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        self.num_tokens, self.conditional = TOKENS, Affine(1)
        self.shift = nn.Linear(TOKENS, TOKENS)
        self.scale = nn.Linear(TOKENS, TOKENS)
        self.labels = nn.Embedding(config.num_classes + 1, TOKENS)
        self.dropout = nn.Dropout(config.dropout)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.1)

    def new_cache(self, x: Tensor, decoding: Decoding | None = None) -> None:
        return None

    def conditioner(
        self,
        x: Tensor,
        label: Tensor | None = None,
        cache: Any = None,
        start: int = 0,
        temperature: Tensor | None = None,
    ) -> Tensor:
        stop = x.shape[1]
        past = self.dropout(x[..., 0])
        shift = past @ self.shift.weight.tril(-1)[:stop, :stop].T + self.shift.bias[:stop]
        log_scale = past @ self.scale.weight.tril(-1)[:stop, :stop].T + self.scale.bias[:stop]
        if label is not None:
            shift = shift + self.labels(label)[:, :stop]
        return torch.stack([log_scale, shift], dim=-1)[:, start:].to(x.dtype)


@final
class Toy(GenerativeModel):
    kind = "toy"
    likelihood_kind = "dequantized"
    event_shape = SHAPE
    levels = LEVELS

    def __init__(self, config: ToyConfig = ToyConfig()) -> None:
        super().__init__()
        self.config = config
        self.blocks = nn.ModuleList(ToyStage(config) for _ in range(3))
        self.register_buffer("variance", torch.ones(TOKENS, 1))

    @property
    def num_classes(self) -> int:
        return self.config.num_classes

    @property
    def stages(self) -> Sequence[nn.Module]:
        return list(self.blocks)

    def encode(self, x: Tensor, label: Tensor | None = None) -> tuple[Tensor, Tensor]:
        z, log_abs_det = x.flatten(1)[..., None], x.new_zeros(len(x))
        for block in self.blocks:
            z, change = block(z, label)
            z, log_abs_det = z.flip(1), log_abs_det + change
        return z, log_abs_det

    def loss(
        self,
        images: Tensor,
        label: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        x = center(images, LEVELS, self.dtype)
        if self.config.noise_std:
            noise = batch.randn(
                x.shape, generator=generator, dtype=self.dtype, device=images.device
            )
            x = x + self.config.noise_std * noise
        z, log_abs_det = self.encode(x, label)
        if self.config.volume_preserving and self.training:
            self.get_buffer("variance").lerp_(batch.mean(z.detach().square().mean(0)), 0.1)
        return (0.5 * z.square().sum((1, 2)) - log_abs_det) / self.dims


def make_toy(config: ToyConfig = ToyConfig()) -> Toy:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Toy(config)


def make_data(
    count: int = 48,
    classes: int = 0,
    shape: tuple[int, int, int] = SHAPE,
    levels: int = LEVELS,
    name: str = "toy",
) -> ImageDataset:
    random = np.random.default_rng(0)
    return ImageDataset(
        images=random.integers(0, levels, (count, *shape), dtype=np.uint8),
        labels=random.integers(0, classes, count) if classes else None,
        id=name,
        version="1",
        split="train",
        levels=levels,
        class_names=tuple(map(str, range(classes))),
        preprocessing="none",
        preprocessing_hash="0",
        fingerprint=name,
    )


def make_everything() -> tuple[Toy, ImageDataset]:
    """A conditional model with noise, dropout and a running variance, and its data."""
    config = ToyConfig(num_classes=3, dropout=0.2, volume_preserving=True)
    return make_toy(config), make_data(classes=3)


def train(run_dir: Path, config: TrainConfig = EVERYTHING) -> FitResult:
    model, data = make_everything()

    def weight(told: Progress) -> dict[str, float]:
        return {"weight": float(told.model.state_dict()["blocks.0.shift.weight"].double().mean())}

    return fit(
        model,
        data,
        config,
        run_dir,
        every={5: weight},
        augmentation=Augmentation(flip=True),
        progress=False,
    )


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _kill_at(where: str, step: int) -> None:
    """Arrange for this process to kill itself."""
    from exactflow.training import trainer

    plain_batches, plain_write = trainer.training_batches, disk.write_atomically
    plain_line = MetricsLog.write

    def batches(dataset: ImageDataset, batch_size: int, *, start: int, **rest: Any) -> Any:
        for index, images in enumerate(
            plain_batches(dataset, batch_size, start=start, **rest), start=start
        ):
            if index == step - 1:
                _die()
            yield images

    def write(path: Path, content: bytes) -> None:
        if path.parent.name == f".step_{step:08d}.partial" and path.name == OPTIMIZER_FILE:
            path.write_bytes(content[: len(content) // 2])
            _die()
        plain_write(path, content)

    def line(log: MetricsLog, content: dict[str, float]) -> None:
        if content["step"] >= step:
            with log._path.open("ab") as file:
                file.write(b'{"step": ')
            _die()
        plain_line(log, content)

    if where == "batch":
        trainer.training_batches = batches
    elif where == "write":
        disk.write_atomically = write
    else:
        MetricsLog.write = line


def main(run_dir: Path, what: str, step: int) -> None:
    torch.set_num_threads(1)
    if what == "compile":
        config = replace(PLAIN, steps=step, compile=True)
        fit(make_toy(), make_data(), config, run_dir, progress=False)
        return
    _kill_at(what, step)
    train(run_dir)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
