"""What is computed once and read by later epochs and runs: frozen features or decoded pixels."""
