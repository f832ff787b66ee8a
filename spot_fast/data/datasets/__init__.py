"""Data sets, one file each, and what finds their images."""
