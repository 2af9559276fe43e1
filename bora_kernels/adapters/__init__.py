"""Adapters of whole models: converting layers, saving, loading, merging, and saying what runs where."""
