"""Decoding on a GPU: keys and values in pages, steps captured in CUDA graphs."""
