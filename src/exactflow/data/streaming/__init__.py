"""Shards that lie elsewhere: fetched ahead of need, cached, never all on this disk."""
