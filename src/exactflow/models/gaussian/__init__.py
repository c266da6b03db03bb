"""Flows fitted in closed form: whitening and Gaussianisation."""
