"""An OpenAI-compatible HTTP endpoint over the ``tensorrt_llm`` model of a Triton server."""
