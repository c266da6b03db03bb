"""DenseFlow (Grcic et al., arXiv 2106.04627)."""
