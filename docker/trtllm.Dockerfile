# An engine of target trtllm behind trtllm-serve (OpenAI's API), on TensorRT-LLM's own image. BASE and DIGEST are from
# docker/versions.env; for another release: the tag of versions.lock.json, and no digest.
ARG BASE
ARG DIGEST=
FROM ${BASE}${DIGEST:+@${DIGEST}}

ENV HF_HUB_OFFLINE=1 \
    TRANSFORMERS_OFFLINE=1 \
    HOME=/tmp

COPY toolchain/deploy/templates/health.py toolchain/deploy/templates/check_versions.py /opt/toolchain/

USER 1000
WORKDIR /tmp
EXPOSE 8000
HEALTHCHECK --start-period=60m --interval=30s --timeout=40s --retries=3 \
    CMD ["python3", "/opt/toolchain/health.py", "--openai", "http://127.0.0.1:8000"]
# The image's own entry point stays: it prepares CUDA's compatibility libraries. The check refuses an engine of another
# release before a weight is read.
CMD ["python3", "/opt/toolchain/check_versions.py", \
     "trtllm-serve", "/engine/checkpoint", "--host", "0.0.0.0", "--port", "8000", \
     "--extra_llm_api_options", "/engine/llm_args.yaml"]
