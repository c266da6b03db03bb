"""Gaussian paths from noise to data, and the models that follow them."""
