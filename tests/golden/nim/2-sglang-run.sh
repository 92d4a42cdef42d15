#!/bin/sh
# NIM 2.x with sglang.
# Not run where it was written: there was no GPU and no NIM.
set -eu
cd "$(dirname "$0")"
: "${NIM_IMAGE:?name the image of NIM, with its tag}"
exec docker run --rm --gpus all --shm-size 16g --user "$(id -u)" --env-file nim.env --mount "type=bind,source=$PWD/model,target=/opt/models/engine,readonly" --publish 127.0.0.1:8000:8000 "$NIM_IMAGE"
