"""Diffusion models with a discrete chain, as the variational bound and its samplers need them.

A chain model is a path model as well: its network, evaluated at times between the steps of the
chain, gives the probability flow that DDIM follows.
"""

from abc import abstractmethod
from typing import ClassVar

from jaxtyping import Float, Shaped
from torch import Tensor

from exactflow.core.model import LikelihoodKind
from exactflow.core.shapes import Images, Labels
from exactflow.paths.chain import MarkovChain
from exactflow.paths.path_model import PathModel


class ChainModel(PathModel):
    """A network that predicts the noise, and perhaps the variance, of the steps of a chain."""

    _likelihood_kind: ClassVar[LikelihoodKind] = "bound"
    usual_solver: ClassVar[str] = "ancestral"
    quick_solver: ClassVar[str] = "ddim"
    evaluations_per_step: ClassVar[int] = 1

    @property
    @abstractmethod
    def chain(self) -> MarkovChain:
        """The whole chain that the network is trained on."""

    @abstractmethod
    def predict_noise(
        self,
        x_t: Images,
        timestep: Shaped[Tensor, " batch"],
        label: Labels | None = None,
        low: Float[Tensor, "batch channels low_height low_width"] | None = None,
    ) -> tuple[
        Images,
        Images | None,
    ]:
        """One evaluation of the network; without `low`, a `chain.Network`.

        Args:
            x_t: noisy images.
            timestep: step of each in `chain`; a real number is a time between steps.
            label: class of each image; None for a dropped label.
            low: the small images in [-1, 1] that an upsampler enlarges; None for other models.

        Returns:
            The predicted noise, and v, which places the log-variance between its bounds; None if
            the variance is fixed.

        Raises:
            ValueError: for labels or small images that the model cannot take, or needs.
        """
