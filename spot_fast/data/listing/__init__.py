"""Which image, mask and list files there are, under which names, and whether they have changed."""
