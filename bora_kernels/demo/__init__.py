"""A demonstration that runs anywhere: fine-tune a small encoder with BoRA beside its peers, save, reload and merge it.

``python -m bora_kernels.demo`` reads in this order: ``__main__`` (command line) → ``experiment`` (the run from start to
end) → ``packages`` and ``data`` (what is trained on) → ``models`` (the methods) → ``training`` → ``adapter`` (save, load,
merge) → ``report`` (table, figure, JSON).
"""
