"""Flows fitted in closed form: whitening and Gaussianisation."""

from exactflow.models.family import Family
from exactflow.models.gaussian import gaussianisation, whitening

WHITENING = Family(whitening.Whitening, whitening.WhiteningConfig, whitening.PRESETS)
GAUSSIANISATION = Family(
    gaussianisation.Gaussianisation, gaussianisation.GaussianisationConfig, gaussianisation.PRESETS
)
