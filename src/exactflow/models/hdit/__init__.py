"""HDiT, hourglass diffusion transformers (Crowson et al., arXiv 2401.11605)."""

from exactflow.models.family import Family
from exactflow.models.hdit.model import HDiT, HDiTConfig
from exactflow.models.hdit.published import FILES
from exactflow.models.presets import read_presets

FAMILY = Family(HDiT, HDiTConfig, read_presets("hdit", HDiTConfig), FILES)
