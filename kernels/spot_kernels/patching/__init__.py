"""`spot_kernels.patch(model)`: slot attention of published implementations runs on our operators, in place."""
