"""`patch(model)`: published slot attention inside a model that exists runs on our operators, in place."""
