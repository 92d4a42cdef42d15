#!/usr/bin/env bash
# One pod of a LeaderWorkerSet that runs TensorRT-LLM over several nodes. TensorRT-LLM's ranks talk MPI, and MPI starts
# them over ssh: workers run an sshd of their own, the leader waits for all of them and calls mpirun.
#   mpi_node.sh RANKS_PER_NODE COMMAND [ARGUMENT...]
# /ssh holds id_ed25519 and id_ed25519.pub (a Secret): the one key of the group, of its hosts as well as of its user, so
# that host keys are checked too. LWS_* are set by the LeaderWorkerSet.
set -euo pipefail

ranks_per_node=$1
shift
port=2222
keys=$(mktemp -d)
install -m 600 /ssh/id_ed25519 "$keys/key"
install -m 644 /ssh/id_ed25519.pub "$keys/key.pub"
read -r kind public _ <"$keys/key.pub"
printf '[*]:%s %s %s\n* %s %s\n' "$port" "$kind" "$public" "$kind" "$public" >"$keys/known_hosts"

if [ "$LWS_WORKER_INDEX" != 0 ]; then
    # As a plain user: no PAM, no privilege separation, its own port.
    exec "$(command -v sshd)" -D -e -f /dev/null -p "$port" -h "$keys/key" \
        -o AuthorizedKeysFile="$keys/key.pub" -o PasswordAuthentication=no -o KbdInteractiveAuthentication=no \
        -o UsePAM=no -o StrictModes=no -o PidFile=none
fi

ssh_options=(-p "$port" -i "$keys/key" -o UserKnownHostsFile="$keys/known_hosts" -o StrictHostKeyChecking=yes
    -o BatchMode=yes -o ConnectTimeout=5)
hosts=$LWS_LEADER_ADDRESS:$ranks_per_node
for ((index = 1; index < LWS_GROUP_SIZE; index++)); do
    # group-0.set.namespace is the leader, group-0-1.set.namespace its first worker.
    host=${LWS_LEADER_ADDRESS/./-$index.}
    until ssh "${ssh_options[@]}" "$host" true; do
        echo "waiting for $host" >&2
        sleep "${WAIT_S:-5}"
    done
    hosts+=,$host:$ranks_per_node
done
# Over ssh nothing of this environment arrives by itself. By its whole path mpirun finds its daemon on the other nodes.
exported=()
for name in $(compgen -e); do
    case $name in
        PATH | LD_LIBRARY_PATH | HOME | PYTHON* | HF_* | TRANSFORMERS_* | NCCL_* | UCX_* | TLLM_* | TRTLLM_*)
            exported+=(-x "$name")
            ;;
    esac
done
exec "$(command -v mpirun)" -n "$((LWS_GROUP_SIZE * ranks_per_node))" --host "$hosts" \
    --map-by "ppr:$ranks_per_node:node" --mca plm_rsh_args "${ssh_options[*]}" "${exported[@]}" \
    trtllm-llmapi-launch "$@"
