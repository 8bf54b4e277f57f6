#!/bin/bash
# Train with torchrun on several nodes by hand. Everything after the script's name goes to
# `portrait-dist train`. On one node `portrait-dist train --nproc gpu …` does the same.
#
#   one node, all its GPUs    launch/torchrun.sh --recipe aisegment_unet data.shards=shards
#   one node, 4 ranks         NPROC_PER_NODE=4 launch/torchrun.sh data.shards=shards
#   two nodes: on the first   NNODES=2 NODE_RANK=0 MASTER_ADDR=node-a launch/torchrun.sh \
#                                 data.shards=/shared/shards run.root=/shared/runs
#              on the second  NNODES=2 NODE_RANK=1 MASTER_ADDR=node-a launch/torchrun.sh (the same)
#   two to four nodes         NNODES=2:4 MAX_RESTARTS=3 … train.global_batch=256: a node that dies
#                             is done without, one that comes is taken in; the batches stay the same
#   save and stop             kill -USR2 (or -TERM) the process of this script, on any node; the
#                             same line again resumes
#
# NNODES          nodes (1), or MIN:MAX
# NODE_RANK       0 on the node whose address MASTER_ADDR is, any other number elsewhere (0)
# MASTER_ADDR     address of that node, reachable from all (localhost)
# MASTER_PORT     port of the rendezvous there; another one for a second run on the same nodes (29400)
# NPROC_PER_NODE  ranks on this node (its GPUs, or 1)
# RUN_ID          the same word on all nodes of one run (portrait-dist)
# MAX_RESTARTS    how often torchrun starts all ranks again after one died (0)
# PYTHON          the Python that has the package (.venv/bin/python of this checkout, else python)
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
if [ -z "${PYTHON:-}" ]; then
    PYTHON=python
    for venv in "$here/../.venv" "$PWD/.venv"; do
        [ -x "$venv/bin/python" ] && PYTHON="$venv/bin/python" && break
    done
    [ -n "${VIRTUAL_ENV:-}" ] && PYTHON="$VIRTUAL_ENV/bin/python"   # an activated one comes first
fi
if ! "$PYTHON" -c "import portrait_dist" 2>/dev/null; then
    echo "$0: $PYTHON does not have portrait_dist; run 'uv sync' in the checkout, activate its" \
         "environment, or set PYTHON to the Python that has it" >&2
    exit 2
fi

gpus=$(nvidia-smi --list-gpus 2>/dev/null | grep -c . || true)
nproc="${NPROC_PER_NODE:-$((gpus > 0 ? gpus : 1))}"
cores=$(nproc)

# OMP_NUM_THREADS: without it torchrun gives each of several ranks one thread; divide the cores.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores > nproc ? cores / nproc : 1))}"
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"   # silent about a bad network otherwise; INFO to look closer
export PYTHONFAULTHANDLER="${PYTHONFAULTHANDLER:-1}"   # a crash in native code shows the Python stack
# NCCL_SOCKET_IFNAME=eth0 picks the network card of the GPUs' traffic where a node has several. Gloo,
# which GPU runs need too (stop agreement), takes the same one, or the card that reaches MASTER_ADDR;
# GLOO_SOCKET_IFNAME overrides that.

# torchrun hands on SIGTERM, SIGINT, SIGHUP and SIGQUIT; SIGUSR2 only when told to. After that it
# gives the ranks so many seconds to save before it kills them (30 where torch knows no
# TORCH_ELASTIC_SHUTDOWN_TIMEOUT).
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-100}"
options=(--nnodes "${NNODES:-1}" --nproc-per-node "$nproc" --max-restarts "${MAX_RESTARTS:-0}")
options+=(--signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR2)
if [ "${NNODES:-1}" = 1 ]; then
    options+=(--standalone)
else
    host=$([ "${NODE_RANK:-0}" = 0 ] && echo 1 || echo 0)
    options+=(--rdzv-backend c10d --rdzv-id "${RUN_ID:-portrait-dist}" --rdzv-conf "is_host=$host")
    options+=(--rdzv-endpoint "${MASTER_ADDR:-localhost}:${MASTER_PORT:-29400}")
fi

exec "$PYTHON" -m torch.distributed.run "${options[@]}" -m portrait_dist train "$@"
