"""Sampling: what one does with a model, knowing none."""
