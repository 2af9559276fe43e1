"""A demonstration that runs anywhere: a small encoder is fine-tuned with BoRA beside its peers.

``python -m examples.demo`` reads in this order: ``__main__`` (command line) → ``experiment`` (the run
from start to end) → ``packages`` and ``data`` (what is trained on) → ``models`` (the methods) → ``training``
→ ``report`` (table, figure, JSON).
"""

METHODS = ("head", "lora", "dora", "bora", "full")
