"""From Hugging Face MoE weights to a served, measured TensorRT-LLM deployment."""

__version__ = "0.1.0"
