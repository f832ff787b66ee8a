"""The model: encoder, slots, decoders and the patch orders; what SPOT computes, without reading or writing a file."""
