"""Diffusion models: discrete chains and continuous time, one file per family."""
