"""MaCow (Ma et al., arXiv 1902.04208)."""
