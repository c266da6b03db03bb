"""Removal of training noise from samples, by the score of a flow's exact density."""

import torch

from exactflow.core.model import Flow, log_density
from exactflow.core.shapes import Images, Labels


def score_denoise(flow: Flow, y: Images, label: Labels | None = None) -> Images:
    """Tweedie's formula, E[x | y] = y + sigma^2 d/dy ln p(y | label) (arXiv 2412.06329, eq. 9).

    Args:
        flow: an exact flow trained with Gaussian noise of standard deviation `noise_std`.
        y: noisy images in [-1, 1] units, as such a model samples them; not clipped.

    Raises:
        ValueError: for a model trained with dequantisation noise, to which it does not apply.
    """
    if flow.noise_std == 0:
        raise ValueError(
            "score denoising needs a model trained with Gaussian noise (noise_std > 0); "
            "this one was trained with uniform dequantisation"
        )
    with torch.enable_grad():
        y = y.detach().requires_grad_(True)
        (score,) = torch.autograd.grad(log_density(flow, y, label).sum(), y)
    return y.detach() + flow.noise_std**2 * score
