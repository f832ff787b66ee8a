"""Weights on disk: our runs, encoders, the authors' and other implementations' files, folders to share."""
