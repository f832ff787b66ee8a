"""Batches in an order that depends on seed and epoch alone, decoded by Pillow or DALI, one batch ahead."""
