"""Flow matching (Lipman et al., arXiv 2210.02747)."""
