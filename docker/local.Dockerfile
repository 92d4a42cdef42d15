# An engine of target local on a real tritonserver: the server that the wheel nvidia-pytriton carries, which is what the
# tests of this project run on. BASE and DIGEST are from docker/versions.env.
ARG BASE
ARG DIGEST=
FROM ${BASE}${DIGEST:+@${DIGEST}}

ENV PYTHONUNBUFFERED=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    TOOLCHAIN_TRITONSERVER=/opt/tritonserver \
    HF_HUB_OFFLINE=1 \
    HOME=/tmp

WORKDIR /src
COPY requirements.lock ./
RUN pip install --no-cache-dir -r requirements.lock
COPY . .
RUN pip install --no-cache-dir --no-deps --no-build-isolation . \
    && toolchain triton install \
    && useradd --uid 1000 --no-create-home --home-dir /tmp toolchain
COPY toolchain/deploy/templates/health.py /opt/toolchain/

USER 1000
WORKDIR /tmp
EXPOSE 8000 8001 8002 8003
HEALTHCHECK --start-period=30m --interval=30s --timeout=40s --retries=3 \
    CMD ["python3", "/opt/toolchain/health.py", "--triton", "http://127.0.0.1:8000"]
ENTRYPOINT ["toolchain"]
# Rendered inside, since the repository holds the paths that this container sees.
CMD ["serve", "/engine", "--repository", "/tmp/repository", "--address", "0.0.0.0"]
