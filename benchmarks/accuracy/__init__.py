"""KL and perplexity of quantized models side by side: ours, plain ModelOpt, llm-compressor. See README.md."""
