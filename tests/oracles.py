"""Path models in closed form: what they predict is known, and nothing is trained."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from exactflow.paths.path import Path
from exactflow.paths.path_model import PathModel, Prediction


@final
@dataclass(frozen=True)
class OracleConfig:
    image_shape: tuple[int, int, int]
    levels: int = 16
    num_classes: int = 0


class PathOracle(PathModel):
    """A path model whose `predict` is a formula, for images of a shape, without classes."""

    kind = "oracle"

    def __init__(self, path: Path, prediction: Prediction, shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.config = OracleConfig(shape)
        self._path, self._prediction = path, prediction

    @property
    def stages(self) -> Sequence[nn.Module]:
        return []

    @property
    def path(self) -> Path:
        return self._path

    @property
    def prediction(self) -> Prediction:
        return self._prediction

    def loss(
        self,
        images: Tensor,
        label: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        raise NotImplementedError("an oracle is not trained")
