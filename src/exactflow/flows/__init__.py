"""Flows, one file per family."""
