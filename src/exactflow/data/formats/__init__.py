"""Readers: a source in each format as stored splits of undecoded images."""
