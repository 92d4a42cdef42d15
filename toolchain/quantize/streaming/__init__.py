"""Quantize models far larger than memory. See README.md of this room."""
