"""One plain-PyTorch file per operator: the oracle for tests and the baseline for benchmarks."""
