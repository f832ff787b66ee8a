"""From the bytes of an image file to a tensor of the model's size."""
