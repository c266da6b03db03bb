"""Remote shards: fetched before they are needed, into a cache of limited size."""
