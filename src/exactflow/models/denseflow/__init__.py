"""DenseFlow (Grcic et al., arXiv 2106.04627)."""

from exactflow.models.denseflow.model import DenseFlow, DenseFlowConfig
from exactflow.models.denseflow.presets import PRESETS
from exactflow.models.denseflow.published import FILES
from exactflow.models.family import Family

FAMILY = Family(DenseFlow, DenseFlowConfig, PRESETS, FILES)
