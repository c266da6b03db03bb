"""HDiT, hourglass diffusion transformers (Crowson et al., arXiv 2401.11605)."""
