"""Models of any kind on the same images, and what papers report."""
