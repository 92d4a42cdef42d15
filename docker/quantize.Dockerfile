# Plan, quantize, verify, evaluate and build: the toolchain and what it pins. On Linux the wheels of PyTorch bring CUDA;
# the driver is the host's. BASE and DIGEST are from docker/versions.env.
ARG BASE
ARG DIGEST=
FROM ${BASE}${DIGEST:+@${DIGEST}}

ENV PYTHONUNBUFFERED=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    HF_HOME=/cache/huggingface \
    HOME=/home/toolchain

WORKDIR /src
COPY requirements.lock ./
RUN pip install --no-cache-dir -r requirements.lock
COPY . .
RUN pip install --no-cache-dir --no-deps --no-build-isolation . \
    && useradd --uid 1000 --create-home toolchain \
    && install -d -o toolchain -g toolchain /cache /work

USER 1000
WORKDIR /work
# It answers no requests, so there is no health to ask for.
HEALTHCHECK NONE
ENTRYPOINT ["toolchain"]
CMD ["doctor"]
