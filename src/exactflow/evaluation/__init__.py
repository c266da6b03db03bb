"""Measuring models on data, and showing what came of it."""
