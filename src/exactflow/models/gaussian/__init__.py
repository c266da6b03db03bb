"""Flows fitted in closed form: whitening and Gaussianisation."""

from exactflow.models.family import Family
from exactflow.models.gaussian.gaussianisation import Gaussianisation, GaussianisationConfig
from exactflow.models.gaussian.whitening import Whitening, WhiteningConfig
from exactflow.models.presets import read_presets

WHITENING = Family(
    Whitening, WhiteningConfig, read_presets("gaussian", WhiteningConfig, "whitening")
)
GAUSSIANISATION = Family(
    Gaussianisation,
    GaussianisationConfig,
    read_presets("gaussian", GaussianisationConfig, "gaussianisation"),
)
