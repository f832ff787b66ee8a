"""Drop-in modules on the operators: slot attention and the permuted decoder."""
