"""How far training moved the magnitudes and the directions of a model's weights, by output and by input feature.

For the rows (output features) or the columns (input features) w_n of a weight before, and w'_n after,

    ΔM = mean_n |‖w'_n‖ − ‖w_n‖|        ΔD = mean_n (1 − cos(w'_n, w_n)) = mean_n ½·‖ŵ'_n − ŵ_n‖²        ŵ = w / ‖w‖

From W0 to the end it is DoRA's equations 3 and 4, from step t−1 to step t what BoRA's second figure shows.

    changes = from_start(model)                      # W0 is still in the adapted layers: nothing had to be kept
    recorder = StepRecorder(model, optimizer)        # before training; afterwards recorder.changes
    correlation(changes, "row"), plot(changes, "changes.png")

``python -m bora_kernels.analysis ADAPTER --base MODEL`` does the former for a saved adapter.

W' is taken from the adapters in float32 (float64 for a float64 base), never from a merged weight in half precision:
its rounding is larger than what a step changes.

Source: DoRA, arXiv 2402.09353, section 3.2; BoRA, arXiv 2412.06441.
"""

from .changes import Change, correlation, plot, table, weight_change
from .recording import StepRecorder, from_start

__all__ = ["Change", "StepRecorder", "correlation", "from_start", "plot", "table", "weight_change"]
