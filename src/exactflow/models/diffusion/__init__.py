"""Discrete-time diffusion: iDDPM (arXiv 2102.09672) and ADM (arXiv 2105.05233)."""

from exactflow.models.diffusion.model import DiscreteDiffusion, DiscreteDiffusionConfig
from exactflow.models.diffusion.published import FILES
from exactflow.models.family import Family
from exactflow.models.presets import read_presets

FAMILY = Family(
    DiscreteDiffusion,
    DiscreteDiffusionConfig,
    read_presets("diffusion", DiscreteDiffusionConfig),
    FILES,
)
