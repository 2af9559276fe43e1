"""Parts of a model that run as one: found by structure, installed in place, left for the plain forward at each call."""
