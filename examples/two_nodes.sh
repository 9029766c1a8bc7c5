#!/usr/bin/env bash
# One fit on several machines by hand. Start it on each of them, within half an hour, the node's number last:
#
#     first$  examples/two_nodes.sh first:29500 2 0 /data/flights.zarr /data/runs/first --centers 1000000
#     second$ examples/two_nodes.sh first:29500 2 1 /data/flights.zarr /data/runs/first --centers 1000000
#
# Node 0 must be the machine that the first argument names: RUN is written there, and nowhere else. The store is read on
# every machine under the same name. The same commands resume the fit.
set -euo pipefail
[ $# -ge 5 ] || { sed -n '2,9s/^# \{0,1\}//p' "$0"; exit 2; }
endpoint=$1 nodes=$2 node=$3
shift 3

# One process a GPU; without GPUs one for the whole machine, whose cores it then uses.
gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
if [ "$gpus" -eq 0 ]; then
    gpus=1
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(nproc)}
fi
# A checkpoint must be saved within this many seconds of a SIGTERM.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-300}

exec torchrun --nnodes "$nodes" --node-rank "$node" --nproc-per-node "$gpus" \
    --master-addr "${endpoint%:*}" --master-port "${endpoint##*:}" --max-restarts 3 \
    -m ep3stream fit "$@"
