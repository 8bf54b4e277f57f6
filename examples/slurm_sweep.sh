#!/bin/bash
# Six runs on SLURM, one per combination, each with checkpoints and requeueing of its own.
#
#   examples/slurm_sweep.sh /shared/shards /shared/runs              queue them
#   examples/slurm_sweep.sh /shared/shards /shared/runs --dry-run    print the sbatch line instead
#
# Each run is named after its values, for example sweep-train.lr=1e-3,train.seed=1. Compare them:
#   for run in /shared/runs/sweep-*; do portrait-dist status "$run"; done
#   tensorboard --logdir /shared/runs
set -euo pipefail

shards=$1 runs=$2
shift 2
exec portrait-dist submit --nodes 1 --gpus-per-node 8 --time 4:00:00 "$@" \
    --array train.lr=3e-3,1e-3 --array train.seed=1,2,3 \
    data.shards="$shards" run.root="$runs" run.name=sweep
