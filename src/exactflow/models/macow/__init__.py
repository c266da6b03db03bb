"""MaCow (Ma et al., arXiv 1902.04208)."""

from exactflow.models.family import Family
from exactflow.models.macow.model import MaCow, MaCowConfig
from exactflow.models.macow.presets import PRESETS
from exactflow.models.macow.published import FILES

FAMILY = Family(MaCow, MaCowConfig, PRESETS, FILES)
