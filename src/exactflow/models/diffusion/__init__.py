"""Discrete-time diffusion: iDDPM (arXiv 2102.09672) and ADM (arXiv 2105.05233)."""
