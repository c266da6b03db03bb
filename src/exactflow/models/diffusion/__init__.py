"""Discrete-time diffusion: iDDPM (arXiv 2102.09672) and ADM (arXiv 2105.05233)."""

from exactflow.models.diffusion.model import DiscreteDiffusion, DiscreteDiffusionConfig
from exactflow.models.diffusion.presets import PRESETS
from exactflow.models.diffusion.published import FILES
from exactflow.models.family import Family

FAMILY = Family(DiscreteDiffusion, DiscreteDiffusionConfig, PRESETS, FILES)
