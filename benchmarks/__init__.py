"""The layer beside its peers: ``pytest benchmarks``, then ``python -m benchmarks.report RESULT.json``."""
