"""TarFlow (Zhai et al., arXiv 2412.06329)."""
