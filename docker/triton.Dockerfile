# Triton with TensorRT-LLM: the llmapi repository of target trtllm, and the ensemble of TensorRT engines of target
# tensorrt. BASE and DIGEST are from docker/versions.env; MODEL is tensorrt_llm for the former, ensemble for the latter.
ARG BASE
ARG DIGEST=
FROM ${BASE}${DIGEST:+@${DIGEST}}

ARG MODEL=tensorrt_llm
ENV MODEL=${MODEL} \
    HF_HUB_OFFLINE=1 \
    TRANSFORMERS_OFFLINE=1 \
    HOME=/tmp

COPY toolchain/deploy/templates/health.py toolchain/deploy/templates/check_versions.py \
     toolchain/deploy/templates/triton_ranks.sh /opt/toolchain/

USER 1000
WORKDIR /tmp
EXPOSE 8000 8001 8002
HEALTHCHECK --start-period=60m --interval=30s --timeout=40s --retries=3 \
    CMD ["sh", "-c", "exec python3 /opt/toolchain/health.py --triton http://127.0.0.1:8000 --model \"$MODEL\""]
# The image's own entry point stays: it prepares CUDA's compatibility libraries. No --disable-auto-complete-config: the
# llmapi layout gets its batch size and policy from model.yaml.
CMD ["python3", "/opt/toolchain/check_versions.py", "tritonserver", "--model-repository=/repository"]
