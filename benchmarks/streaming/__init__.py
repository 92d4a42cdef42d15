"""Quantization of checkpoints larger than memory: seconds, bytes and memory, ours against peers. See README.md."""
