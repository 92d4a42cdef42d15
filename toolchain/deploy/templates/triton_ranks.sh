#!/usr/bin/env bash
# tritonserver for TensorRT engines: one process for each rank, of which only the first serves.
#   triton_ranks.sh RANKS [ARGUMENT...]
# The others stay inside loading tensorrt_llm, where they run their rank (scripts/launch_triton_server.py of the
# tensorrtllm_backend does the same). Each has a prefix of its own for the shared memory of its Python stubs.
set -euo pipefail

ranks=$1
shift
words=()
for ((rank = 0; rank < ranks; rank++)); do
    ((rank == 0)) || words+=(:)
    words+=(-n 1 tritonserver --model-repository=/repository --disable-auto-complete-config
        "--backend-config=python,shm-region-prefix-name=rank${rank}_" "$@")
    ((rank == 0)) || words+=(--model-control-mode=explicit --load-model=tensorrt_llm)
done
if ((ranks == 1)); then
    exec "${words[@]:2}"
fi
exec mpirun "${words[@]}"
