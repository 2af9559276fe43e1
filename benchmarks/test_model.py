"""Four Llama-shaped layers with random weights and adapters on all seven linears."""

LEVEL = "model"


def test_model(harness, benchmark, case, provider) -> None:
    harness.measure(case, provider, benchmark)
