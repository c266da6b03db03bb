"""MaskDiT, masked diffusion transformers (Zheng et al., arXiv 2306.09305)."""

from exactflow.models.family import Family
from exactflow.models.maskdit.model import MaskDiT, MaskDiTConfig
from exactflow.models.maskdit.published import FILES
from exactflow.models.presets import read_presets

FAMILY = Family(MaskDiT, MaskDiTConfig, read_presets("maskdit", MaskDiTConfig), FILES)
