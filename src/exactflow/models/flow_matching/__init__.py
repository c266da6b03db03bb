"""Flow matching (Lipman et al., arXiv 2210.02747)."""

from exactflow.models.family import Family
from exactflow.models.flow_matching.model import FlowMatching, FlowMatchingConfig
from exactflow.models.flow_matching.presets import PRESETS

FAMILY = Family(FlowMatching, FlowMatchingConfig, PRESETS)
