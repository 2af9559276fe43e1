"""The study of BoRA's quality: ``PLAN.md`` says what, ``README.md`` how; ``python -m benchmarks.quality`` runs it."""
