"""TarFlow (Zhai et al., arXiv 2412.06329)."""

from exactflow.models.family import Family
from exactflow.models.presets import read_presets
from exactflow.models.tarflow.config import TarFlowConfig
from exactflow.models.tarflow.model import TarFlow
from exactflow.models.tarflow.published import FILES

FAMILY = Family(TarFlow, TarFlowConfig, read_presets("tarflow", TarFlowConfig), FILES)
