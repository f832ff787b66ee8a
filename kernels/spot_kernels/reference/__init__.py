"""One plain PyTorch file per operator: the oracle of the tests and the baseline of the benchmarks."""
