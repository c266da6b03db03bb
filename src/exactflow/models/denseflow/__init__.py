"""DenseFlow (Grcic et al., arXiv 2106.04627)."""

from exactflow.models.denseflow.model import DenseFlow, DenseFlowConfig
from exactflow.models.denseflow.published import FILES
from exactflow.models.family import Family
from exactflow.models.presets import read_presets

FAMILY = Family(DenseFlow, DenseFlowConfig, read_presets("denseflow", DenseFlowConfig), FILES)
