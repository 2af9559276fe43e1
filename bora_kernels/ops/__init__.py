"""The layer below its door: checks, operators, the custom backward, both backends, and the layer on shards."""
