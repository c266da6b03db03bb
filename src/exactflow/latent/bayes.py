"""Classification by Bayes' rule: a conditional model of images is a classifier of them.

p(c | x) is proportional to p(x | c) p(c). A likelihood counts every dimension as independent
evidence, so that its posterior is overconfident; one temperature, fitted to held-out images,
calibrates it (Guo et al., arXiv 1706.04599) and changes no decision under a uniform prior.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from jaxtyping import Float, Int, Integer
from scipy.optimize import minimize_scalar
from torch import Tensor

from exactflow.core.model import GenerativeModel
from exactflow.core.progress import tracked
from exactflow.likelihood.log_likelihood import log_likelihood
from exactflow.pictures.figures import BLUE, GREY, RED, in_style, new_figure, png_of

LARGEST_TEMPERATURE = 1e6
BINS = 15  # of confidence, in the calibration error (Guo et al., section 4)


@final
@dataclass(frozen=True)
class Reliability:
    """Accuracy by bins of confidence.

    Attributes:
        count: images in each of the equal bins of (0, 1].
        confidence: mean probability of the chosen class; NaN in an empty bin.
        accuracy: share classified right; NaN in an empty bin.
    """

    count: Int[Tensor, " bins"]
    confidence: Float[Tensor, " bins"]
    accuracy: Float[Tensor, " bins"]

    @property
    def error(self) -> float:
        """Expected calibration error: mean |accuracy - confidence| over images (eq. 3)."""
        gap = (self.accuracy - self.confidence).abs().nan_to_num()
        return float((gap * self.count).sum() / self.count.sum())


@final
@dataclass(frozen=True)
class Classification:
    """A posterior and the true classes.

    Attributes:
        log_posterior: ln p(c | x) in nats.
        labels: the true classes.
    """

    log_posterior: Float[Tensor, "n classes"]
    labels: Int[Tensor, " n"]

    @property
    def decided(self) -> Int[Tensor, " n"]:
        """The most probable class of each image."""
        return self.log_posterior.argmax(1)

    @property
    def accuracy(self) -> float:
        """Share of images classified right."""
        return float((self.decided == self.labels).double().mean())

    @property
    def negative_log_likelihood(self) -> float:
        """Mean -ln p(true class | x) in nats."""
        return float(-self.log_posterior.gather(1, self.labels[:, None]).mean())

    @property
    def confusion(self) -> Int[Tensor, "classes classes"]:
        """Images of each true class (row) by decision (column)."""
        classes = self.log_posterior.shape[1]
        pairs = self.labels * classes + self.decided
        return torch.bincount(pairs, minlength=classes**2).view(classes, classes)

    def reliability(self, bins: int = BINS) -> Reliability:
        """Accuracy by confidence."""
        sure = self.log_posterior.amax(1).exp()
        place = (sure * bins).ceil().long().clamp(1, bins) - 1
        count = torch.bincount(place, minlength=bins)
        right = (self.decided == self.labels).double()
        confidence = torch.bincount(place, sure, minlength=bins) / count
        accuracy = torch.bincount(place, right, minlength=bins) / count
        return Reliability(count, confidence, accuracy)

    def describe(self) -> dict[str, Any]:
        """The numbers, JSON-able."""
        n = len(self.labels)
        return {
            "images": n,
            "accuracy": self.accuracy,
            "accuracy_standard_error": math.sqrt(self.accuracy * (1 - self.accuracy) / n),
            "negative_log_likelihood": self.negative_log_likelihood,
            "expected_calibration_error": self.reliability().error,
        }


def as_conditional(model: GenerativeModel) -> GenerativeModel:
    """The model, if it has classes. Raises ValueError otherwise."""
    if model.num_classes == 0:
        raise ValueError(
            f"Bayes' rule needs a conditional model, trained with labels (such as "
            f"model.num_classes=10), got an unconditional one of kind {model.kind!r}"
        )
    return model


def class_log_likelihoods(
    model: GenerativeModel,
    images: Integer[Tensor, "n channels height width"],
    *,
    k: int = 1,
    seed: int = 0,
    batch_size: int = 64,
    progress: bool = False,
) -> Float[Tensor, "n classes"]:
    """ln p(x | c) in nats for every class, float64, with the same noise for all classes.

    Args:
        model: a conditional model that `log_likelihood` can score.
        images: grey levels 0 .. levels-1.
        k: noise draws per image.
        seed: image i's noise is a function of (seed, i), whatever the batch size.
        batch_size: images evaluated together, for one class at a time.
        progress: show a bar over batches and classes.

    Raises:
        ValueError: for an unconditional model, or images that are not the model's.
        NonFiniteError: for a likelihood that is not finite.
    """
    as_conditional(model)
    if batch_size < 1:
        raise ValueError(f"expected batch_size >= 1, got {batch_size}")
    classes = range(model.num_classes)
    parts = [(first, c) for first in range(0, len(images), batch_size) for c in classes]
    nats = torch.empty(len(images), model.num_classes, dtype=torch.float64)
    for first, c in tracked(parts, len(parts), "scoring every class", shown=progress):
        rows = slice(first, first + batch_size)
        label = torch.full((len(images[rows]),), c)
        score = log_likelihood(
            model, images[rows], label, k, seed, first=first, batch_size=batch_size
        )
        nats[rows, c] = score.nats.double()
    return nats


def log_posterior(
    nats: Float[Tensor, "n classes"],
    prior: Sequence[float] | None = None,
    temperature: float = 1.0,
) -> Float[Tensor, "n classes"]:
    """ln p(c | x) by Bayes' rule, by log-sum-exp: proportional to p(x | c)^(1/temperature) p(c).

    Args:
        nats: ln p(x | c).
        prior: p(c), in any unit; None: uniform.
        temperature: divides the log-likelihoods, not the prior: 1 is Bayes' rule itself.

    Raises:
        ValueError: a prior that is none over these classes, or a temperature that is not positive.
    """
    if not 0 < temperature < math.inf:
        raise ValueError(f"expected a temperature > 0, got {temperature}")
    joint = nats / temperature + log_prior(prior, nats.shape[1]).to(nats)
    return joint - joint.logsumexp(1, keepdim=True)


def calibrate(
    nats: Float[Tensor, "n classes"],
    labels: Int[Tensor, " n"],
    prior: Sequence[float] | None = None,
) -> float:
    """The temperature with the least -ln p(true class | x) on these images.

    The loss is convex in 1 / temperature. If every image has its largest likelihood under its own
    class, the loss has no minimum (it falls as the temperature goes to 0), and 1 is returned.

    Args:
        nats: ln p(x | c) of images the model was not trained on.
        labels: their classes.
        prior: p(c); None: uniform.

    Raises:
        ValueError: labels that are none of the classes, or no images.
    """
    n, classes = nats.shape
    known = tuple(labels.shape) == (n,) and bool(((labels >= 0) & (labels < classes)).all())
    if n == 0 or not known:
        raise ValueError(
            f"expected a label 0 .. {classes - 1} for each of at least one image, got {n} images "
            f"and labels {labels.tolist()[:8]}"
        )
    own = nats.gather(1, labels[:, None])
    if bool((own >= nats).all()):
        return 1.0

    def loss(log_temperature: float) -> float:
        after = log_posterior(nats, prior, math.exp(log_temperature))
        return Classification(after, labels).negative_log_likelihood

    most = math.log(LARGEST_TEMPERATURE)
    found = minimize_scalar(loss, bounds=(-most, most), method="bounded", options={"xatol": 1e-6})
    return math.exp(float(found.x))


def log_prior(prior: Sequence[float] | None, classes: int) -> Float[Tensor, " classes"]:
    """ln p(c), float64; None: uniform. Raises ValueError unless every class has a probability."""
    given = torch.tensor([1.0] * classes if prior is None else prior, dtype=torch.float64)
    if tuple(given.shape) != (classes,) or not bool((given > 0).all() & given.isfinite().all()):
        raise ValueError(
            f"expected a positive prior probability for each of {classes} classes, got {prior}"
        )
    return (given / given.sum()).log()


@in_style()
def classification_plot(
    found: Mapping[str, Classification], class_names: Sequence[str], title: str
) -> bytes:
    """PNG: accuracy by confidence of every posterior, and the confusion of the last.

    Raises:
        ImportError: without the extra `report`.
    """
    figure = new_figure(10, 4.6)
    reliability, confusion = figure.subplots(1, 2)
    figure.suptitle(title)
    reliability.plot([0, 1], [0, 1], ":", color=GREY, label="calibrated perfectly")
    for (name, classification), color in zip(found.items(), (RED, BLUE), strict=True):
        bins = classification.reliability()
        used = bins.count > 0
        size = 14 + 180 * (bins.count[used] / bins.count.sum())
        label = f"{name}: error {bins.error:.3f}"
        x, y = bins.confidence[used].tolist(), bins.accuracy[used].tolist()
        reliability.plot(x, y, color=color, linewidth=0.8, alpha=0.35)
        reliability.scatter(x, y, s=size.tolist(), color=color, alpha=0.8)
        reliability.plot([], [], "o", color=color, label=label)
    reliability.set(xlabel="probability of the class decided for", ylabel="share right")
    reliability.set_title("reliability; larger dots hold more images")
    reliability.legend(loc="upper left")
    last = [*found.values()][-1]
    table = last.confusion.double()
    shares = table / table.sum(1, keepdim=True).clamp(min=1)
    confusion.imshow(shares.tolist(), cmap="Blues", vmin=0, vmax=1)
    ticks = range(len(class_names))
    confusion.set_xticks(ticks, class_names, rotation=60, ha="right")
    confusion.set_yticks(ticks, class_names)
    for row, column in (table > 0).nonzero().tolist():
        shade = "white" if float(shares[row, column]) > 0.5 else "#333"
        count = str(int(table[row, column]))
        confusion.text(column, row, count, ha="center", va="center", fontsize=7, color=shade)
    confusion.set(xlabel="decided", ylabel="true")
    confusion.set_title(f"accuracy {last.accuracy:.1%}")
    return png_of(figure)
