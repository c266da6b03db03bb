"""Flow matching (Lipman et al., arXiv 2210.02747)."""

from exactflow.models.family import Family
from exactflow.models.flow_matching.model import FlowMatching, FlowMatchingConfig
from exactflow.models.presets import read_presets

FAMILY = Family(FlowMatching, FlowMatchingConfig, read_presets("flow_matching", FlowMatchingConfig))
