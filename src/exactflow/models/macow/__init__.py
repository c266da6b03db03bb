"""MaCow (Ma et al., arXiv 1902.04208)."""

from exactflow.models.family import Family
from exactflow.models.macow.model import MaCow, MaCowConfig
from exactflow.models.macow.published import FILES
from exactflow.models.presets import read_presets

FAMILY = Family(MaCow, MaCowConfig, read_presets("macow", MaCowConfig), FILES)
