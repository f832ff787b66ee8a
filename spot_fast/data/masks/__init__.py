"""Ground truth: label maps and COCO annotations, laid on the image that they are of."""
