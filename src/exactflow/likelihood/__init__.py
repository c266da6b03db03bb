"""Scoring: likelihoods with their kind."""
