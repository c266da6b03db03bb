"""The nouns: what a model is. What one does with it (sample, score, train) lives elsewhere."""

import math
import re
import sys
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Literal, final

import torch
from jaxtyping import Float, Integer
from torch import Tensor, nn

from exactflow.core import grey_levels as grey
from exactflow.core.prior import Prior
from exactflow.core.serialization import CLASS_NAMES, write_model
from exactflow.core.shapes import GreyLevels, Images, Labels, Latents, PerSample
from exactflow.core.transform import AutoregressiveTransform, Solver
from exactflow.parallel import shared_batch as batch

LikelihoodKind = Literal["dequantized", "bound", "estimate", "noisy-density"]
Dequantization = Literal["uniform", "variational", "gaussian", "none"]


class NonFiniteError(ArithmeticError):
    """A NaN or an infinity where a number must stand; the message says where and how far off."""


@final
@dataclass(frozen=True)
class ParameterRule:
    """How some parameters are trained.

    Attributes:
        pattern: regular expression that matches the whole of their names.
        rate: factor of the learning rate.
        decay: whether weights decay.
        matrices: how many of a layer's matrices each weight stacks, which Muon moves; 0: none.
    """

    pattern: str
    rate: float = 1.0
    decay: bool = True
    matrices: int = 0


class GenerativeModel(nn.Module, ABC):
    """A distribution over images, possibly given a class label.

    Attributes:
        kind: the family's name in the registry.
        closed_form: whether its parameters follow from the data at once, without training steps.
        iterative: whether a score or a sample takes many evaluations of a network, of a chain or a
            differential equation.
        quick_solver: the solver of samples that must not take long; "auto" is the usual one.
        evaluations_per_step: of a network, by the quick solver.
        most_steps: that a solver can take; of a chain, as many as it has.
        config: frozen dataclass with everything that defines the architecture and its noise;
            `image_shape`, `levels` and `num_classes` among it.
        class_names: of the classes 0, 1, ..., as of the data it was trained on; empty if unknown.
        card: what the folder it was loaded from says of it beside its configuration.
        parameter_rules: how parameters are trained; for each the first whose pattern fits.
    """

    kind: ClassVar[str]
    closed_form: ClassVar[bool] = False
    iterative: ClassVar[bool] = False
    quick_solver: ClassVar[str] = "auto"
    evaluations_per_step: ClassVar[int] = 1
    most_steps: int = sys.maxsize
    parameter_rules: ClassVar[tuple[ParameterRule, ...]] = ()
    config: Any
    class_names: tuple[str, ...] = ()
    card: Mapping[str, Any] = MappingProxyType({})

    @property
    def event_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of one image."""
        return self.config.image_shape

    @property
    def levels(self) -> int:
        """Number of grey levels of the images the model is made for."""
        return self.config.levels

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 for an unconditional model."""
        return self.config.num_classes

    @property
    @abstractmethod
    def likelihood_kind(self) -> LikelihoodKind:
        """What its log-likelihood is.

        "dequantized", an exact density over the noise inside a grey level; "bound", of an augmented
        flow or a diffusion chain; "estimate", of a probability flow; "noisy-density", of a model
        trained with Gaussian noise, which is no code length.
        """

    @property
    @abstractmethod
    def stages(self) -> Sequence[nn.Module]:
        """The repeated parts in order: what a trainer compiles, checkpoints or shards singly."""

    @abstractmethod
    def loss(
        self,
        images: GreyLevels,
        label: Labels | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> PerSample:
        """Training loss of each image.

        Args:
            images: grey levels 0 .. levels-1 as they come from the data.
            label: classes 0 .. num_classes-1, or `null_label`; None drops all labels.
            generator: source of dequantisation noise and label dropout, on the images' device.
        """

    def forward(
        self,
        images: GreyLevels,
        label: Labels | None = None,
        generator: torch.Generator | None = None,
    ) -> PerSample:
        """`loss`, under the name that PyTorch's wrappers call."""
        return self.loss(images, label, generator=generator)

    def rule_of(self, parameter: str) -> ParameterRule:
        """How the parameter of that name is trained."""
        fitting = (rule for rule in self.parameter_rules if re.fullmatch(rule.pattern, parameter))
        return next(fitting, ParameterRule(".*"))

    def quick_steps(self, evaluations: int) -> int | None:
        """Steps of the quick solver with about so many evaluations; None: it knows its own."""
        steps = min(max(1, evaluations // self.evaluations_per_step), self.most_steps)
        return steps if self.iterative else None

    @property
    def dims(self) -> int:
        """Number of dimensions of one image, C * H * W."""
        return math.prod(self.event_shape)

    @property
    def null_label(self) -> int:
        """The class that stands for a dropped label: one past the last real class."""
        return self.num_classes

    @property
    def num_parameters(self) -> int:
        """Number of trainable numbers."""
        return sum(p.numel() for p in self.parameters())

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the parameters."""
        return next(self.parameters()).dtype

    @property
    def level_nats(self) -> float:
        """Minus ln of the volume in [-1, 1] of the grey levels of an image."""
        return self.dims * grey.nats_per_level_interval(self.levels)

    @property
    def wide_dtype(self) -> torch.dtype:
        """Of numbers outside the network: float32, or the parameters' where that is wider."""
        return torch.promote_types(self.dtype, torch.float32)

    def drop_labels(self, label: Labels | None, generator: torch.Generator | None) -> Labels | None:
        """In training, each label is the null class with probability `label_dropout`."""
        if label is None or not self.training or not self.num_classes:
            return label
        chance = batch.rand(label.shape, generator=generator, device=label.device)
        return label.masked_fill(chance < self.config.label_dropout, self.null_label)

    def check_label(self, label: Tensor | None, batch: int) -> None:
        """Raise ValueError unless `label` is None or (batch,) classes 0 .. num_classes (null)."""
        if label is None:
            return
        if self.num_classes == 0:
            raise ValueError("this model is unconditional: expected label=None, got labels")
        if label.dtype != torch.int64 or tuple(label.shape) != (batch,):
            raise ValueError(
                f"expected labels of type torch.int64 and shape ({batch},), "
                f"got {label.dtype} {tuple(label.shape)}"
            )
        if batch and label.device.type == "cpu":  # elsewhere the embedding checks its bounds
            low, high = int(label.min()), int(label.max())
            if low < 0 or high > self.null_label:
                raise ValueError(
                    f"expected classes 0 .. {self.num_classes - 1}, or {self.null_label} for a "
                    f"dropped label, got {low} .. {high}"
                )

    def save_pretrained(self, path: str | Path, *, card: Mapping[str, Any] | None = None) -> None:
        """Write config.json (with `kind`), model.safetensors and a model card (README.md).

        Args:
            path: folder, made if absent.
            card: what to say of the model beside its configuration: data, metrics, cost. The names
                of its classes are added.
        """
        names = {CLASS_NAMES: list(self.class_names)} if self.class_names else {}
        write_model(self, self.kind, self.config, Path(path), {**(card or {}), **names})


class Flow(GenerativeModel):
    """A model given by an invertible map from images to a simple prior.

    Attributes:
        exact: whether prior and log-determinant give the density itself; false for augmented
            flows, which give a bound.
        plans: what `exactflow.plan` chose for it; `sample` goes by one of this machine.
    """

    exact: ClassVar[bool]
    plans: Sequence[Any] = ()

    def __init_subclass__(cls) -> None:
        """Every family's `encode` has one door: images as people have them, at least one."""
        super().__init_subclass__()
        if "encode" in vars(cls):
            cls.encode = grey.with_a_door(cls.encode)

    @property
    @abstractmethod
    def prior(self) -> Prior:
        """Distribution of the latent."""

    @property
    def noise_std(self) -> float:
        """Standard deviation of Gaussian training noise in [-1, 1] units; 0 = dequantisation.

        A model trained with Gaussian noise has the density of noisy images: no bits/dim.
        """
        return self.config.noise_std

    @property
    @abstractmethod
    def dequantization(self) -> Dequantization:
        """Law of the noise of `draw`: uniform on [0, 1) for "uniform", else standard normal.

        "variational": a learned law inside a grey level (Ho et al., Flow++, arXiv 1902.00275).
        """

    @property
    @abstractmethod
    def noise_shape(self) -> tuple[int, ...]:
        """Shape of the noise that one draw takes for each image."""

    @abstractmethod
    def draw(
        self, images: GreyLevels, label: Labels | None, noise: Float[Tensor, "batch *noise"]
    ) -> PerSample:
        """One draw of ln w in nats, with E[w] at most the probability of the integer image.

        The logarithm of the mean of w over k draws is closer to ln P the more they are. Of a
        "noisy-density", ln p of one noisy image with respect to [-1, 1].

        Args:
            images: grey levels.
            label: class of each image; None for a dropped label.
            noise: of the law and shape that `dequantization` and `noise_shape` say.
        """

    @abstractmethod
    def encode(self, x: Images, label: Labels | None = None) -> tuple[Latents, PerSample]:
        """Latent of images in [-1, 1] and ln |det dz/dx|, summed, in nats.

        A numpy array of such images and PIL images (`from_grey_levels`) are taken too.
        """

    @abstractmethod
    def trajectory(
        self, z: Latents, label: Labels | None = None, *, solver: Solver | None = None
    ) -> Iterator[Images]:
        """From latent to image: the latent laid out as an image, then the result of each part.

        Carries no gradient.

        Args:
            z: latents as `encode` gives them; not changed.
            label: class of each sample; None for a dropped label.
            solver: inverts the autoregressive parts; None for the reference inverse.
        """

    def decode(
        self, z: Latents, label: Labels | None = None, *, solver: Solver | None = None
    ) -> Images:
        """Images in [-1, 1] of latents: the end of `trajectory`."""
        (x,) = deque(self.trajectory(z, label, solver=solver), maxlen=1)
        return x

    def check_input(self, x: Tensor, label: Tensor | None, *, latent: bool = False) -> None:
        """Raise ValueError unless x are floating-point images or latents, and labels theirs."""
        shape = self.prior.shape if latent else self.event_shape
        if tuple(x.shape) != (len(x), *shape) or not x.is_floating_point():
            raise ValueError(
                f"expected floating-point {'latents' if latent else 'images in [-1, 1]'} of shape "
                f"(batch, {', '.join(map(str, shape))}), got {x.dtype} {tuple(x.shape)}"
            )
        self.check_label(label, len(x))

    def from_grey_levels(self, images: GreyLevels) -> Images:
        """Images in [-1, 1] without noise: centred, or the midpoint of every grey level."""
        grey.check_images(images, self.event_shape, self.levels)
        if self.noise_std > 0:
            return grey.center(images, self.levels, self.wide_dtype)
        middle = torch.full_like(images, 0.5, dtype=self.wide_dtype)
        return grey.dequantize(images, middle, self.levels)

    def to_grey_levels(
        self, x: Float[Tensor, "*batch channels height width"]
    ) -> Integer[Tensor, "*batch channels height width"]:
        """Grey levels of images in [-1, 1]; only here is anything clipped to the range."""
        quantize = grey.quantize_centered if self.noise_std > 0 else grey.quantize_dequantized
        return quantize(x, self.levels)


class DataInitialized(ABC):
    """A model whose first parameters are read off images before its training."""

    @property
    @abstractmethod
    def initial_images(self) -> int:
        """How many images to initialise on."""

    @abstractmethod
    def initialize(self, images: GreyLevels, *, generator: torch.Generator | None = None) -> None:
        """Set those parameters from grey levels; nothing if that was done.

        Args:
            images: grey levels 0 .. levels-1.
            generator: source of dequantisation noise, on the images' device.
        """


@contextmanager
def evaluating(model: GenerativeModel) -> Iterator[None]:
    """The model is in evaluation mode inside: no sample's result depends on its batch mates."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def autoregressive_parts(flow: Flow) -> list[AutoregressiveTransform]:
    """The parts of a flow that a solver is asked to invert; a dequantiser's are never inverted."""
    return [p for s in flow.stages for p in s.modules() if isinstance(p, AutoregressiveTransform)]


def log_density(flow: Flow, x: Images, label: Labels | None = None) -> PerSample:
    """ln p(x | label) in nats, with respect to x in [-1, 1] (change of variables).

    Raises:
        ValueError: for an augmented flow, which has a bound and no density.
    """
    if not flow.exact:
        raise ValueError(f"{flow.kind} is an augmented flow: it has a bound, not a density")
    z, log_abs_det = flow.encode(x, label)
    return flow.prior.log_prob(z) + log_abs_det
