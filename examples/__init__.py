"""Scripts to start from; ``demo`` is run as ``python -m examples.demo`` from the repository's root."""
