"""Every family of models, a folder for each; one registry, conversion, models on disk."""
