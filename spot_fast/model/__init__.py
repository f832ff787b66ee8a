"""SPOT's computation: frozen encoder, slot encoder, decoders, patch orders. No module here reads or writes a file."""
