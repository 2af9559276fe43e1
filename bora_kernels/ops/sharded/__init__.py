"""The layer over a weight that is sharded over a mesh of devices."""
