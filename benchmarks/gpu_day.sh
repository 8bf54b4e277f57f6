#!/usr/bin/env bash
# One session on a GPU machine: doctor, the tests of tests/gpu, then the benchmarks.
#
#   benchmarks/gpu_day.sh OUT [--device cuda|cpu] [--shards DIR] [--seconds N] [--only STEP …]
#
# OUT gets one log for each step (NAME.log), the benchmarks' NAME.json, and summary.txt with each
# step's exit code and seconds. Each step is ended after its own limit, so that one that hangs costs
# the others nothing; --seconds bounds the whole session, and steps that no longer fit are named.
# --device cpu is a dry run of everything on small sizes. Needs no installation and no network: a
# Python 3.11 or newer with torch 2.11 or newer, torchvision and pytest, and PYTHONPATH naming a folder
# with the other packages (wheels unpacked by "pip install --no-index --no-deps --target"). Without
# pytest the step "tests" fails and the others run. Portraits are generated and packed where --shards
# names none. PYTHON names another interpreter. The exit code is the number of failed steps.
set -u
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
[ $# -ge 1 ] || { sed -n '2,/^set/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 2; }
mkdir -p "$1" || exit 2
OUT=$(cd "$1" && pwd); shift
DEVICE=cuda SHARDS="" SECONDS_LEFT=1700 ONLY=""
while [ $# -gt 0 ]; do
  case $1 in
    --device) DEVICE=$2; shift 2 ;;
    --shards) SHARDS=$(cd "$2" && pwd) || exit 2; shift 2 ;;
    --seconds) SECONDS_LEFT=$2; shift 2 ;;
    --only) shift; while [ $# -gt 0 ] && [ "${1#--}" = "$1" ]; do ONLY="$ONLY $1"; shift; done ;;
    *) echo "gpu_day.sh: $1: there is no such option" >&2; exit 2 ;;
  esac
done
case $DEVICE in cuda|cpu) ;; *) echo "gpu_day.sh: --device is cuda or cpu" >&2; exit 2 ;; esac
if [ -z "${PYTHON:-}" ]; then
  PYTHON=python3
  [ -x "$HERE/.venv/bin/python" ] && PYTHON=$HERE/.venv/bin/python
fi
export PYTHONPATH="$HERE${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
cd "$HERE" || exit 2
FAILED=0
: > "$OUT/summary.txt"

# step NAME LIMIT COMMAND …: run a command for at most LIMIT seconds, its output into OUT/NAME.log
step() {
  local name=$1 limit=$2 code begin=$SECONDS; shift 2
  case " $ONLY " in "  ") ;; *" $name "*) ;; *) return ;; esac
  if [ "$SECONDS_LEFT" -le 5 ]; then
    echo "$name: not begun, the session's time is over" | tee -a "$OUT/summary.txt"
    FAILED=$((FAILED + 1))
    return
  fi
  [ "$limit" -gt "$SECONDS_LEFT" ] && limit=$SECONDS_LEFT
  timeout --kill-after=10 "$limit" "$@" > "$OUT/$name.log" 2>&1
  code=$?
  local took=$((SECONDS - begin)) word="exit code $code"
  SECONDS_LEFT=$((SECONDS_LEFT - took))
  [ $code -eq 0 ] && word="done"
  { [ $code -eq 124 ] || [ $code -eq 137 ]; } && word="ended after its $limit s"
  echo "$name: $word, $took s" | tee -a "$OUT/summary.txt"
  [ $code -eq 0 ] || { FAILED=$((FAILED + 1)); tail -5 "$OUT/$name.log"; }
}

# shards: portraits, generated, split and packed
make_shards() {
  local pairs=2000 size=256x256
  [ "$DEVICE" = cpu ] && pairs=60 size=64x64
  "$PYTHON" -m portrait_dist synth --out "$OUT/data/raw" --pairs $pairs --seed 1 &&
    "$PYTHON" -m portrait_dist prepare --raw "$OUT/data/raw" --out "$OUT/data/tree" &&
    "$PYTHON" -m portrait_dist pack --data "$OUT/data/tree" --out "$OUT/data/shards" --size $size
}
export -f make_shards
export OUT DEVICE PYTHON

if [ "$DEVICE" = cuda ]; then
  SMALL=() STEPS=60 BATCHES="--batch 64"
else
  SMALL=(--quick --repeats 1 --features 2) STEPS=2 BATCHES="--batch 4"
fi
B=benchmarks
[ "$DEVICE" = cuda ] && step gpu 20 nvidia-smi
if [ -z "$SHARDS" ]; then
  step shards 300 bash -c make_shards
  SHARDS=$OUT/data/shards
fi
step doctor 120 "$PYTHON" -m portrait_dist doctor --shards "$SHARDS"
step tests 600 "$PYTHON" -m pytest -p no:cacheprovider tests/gpu --device "$DEVICE"
# The short ones first: a session may be too short for all.
step step_parts 300 "$PYTHON" $B/step_parts.py --device "$DEVICE" --json "$OUT/step_parts.json" \
  $([ "$DEVICE" = cpu ] && echo --quick)
step epoch_ends 200 "$PYTHON" $B/epoch_ends.py --json "$OUT/epoch_ends.json" \
  $([ "$DEVICE" = cpu ] && echo --quick --repeats 1 --features 2)
step scaling 300 "$PYTHON" $B/scaling.py --device "$DEVICE" --shards "$SHARDS" "${SMALL[@]}" \
  $BATCHES --ranks 1 --steps "$STEPS" --json "$OUT/scaling.json"
step loader 300 "$PYTHON" $B/loader.py --data "$SHARDS" --json "$OUT/loader.json" \
  $([ "$DEVICE" = cpu ] && echo --quick --repeats 1)
step train 300 "$PYTHON" $B/train.py --device "$DEVICE" --shards "$SHARDS" "${SMALL[@]}" $BATCHES \
  --steps "$([ "$DEVICE" = cpu ] && echo 2 || echo 20)" --json "$OUT/train.json"
step train_batch_16 200 "$PYTHON" $B/train.py --device "$DEVICE" --shards "$SHARDS" "${SMALL[@]}" \
  --batch "$([ "$DEVICE" = cpu ] && echo 2 || echo 16)" --steps "$STEPS" \
  --json "$OUT/train_batch_16.json"
step train_step 300 "$PYTHON" $B/train_step.py --device "$DEVICE" "${SMALL[@]}" --steps "$STEPS" \
  --json "$OUT/train_step.json" $([ "$DEVICE" = cpu ] && echo --size 32)
step train_compiled 300 "$PYTHON" $B/train.py --device "$DEVICE" --shards "$SHARDS" "${SMALL[@]}" \
  $BATCHES --steps "$([ "$DEVICE" = cpu ] && echo 2 || echo 20)" --json "$OUT/train_compiled.json" \
  $([ "$DEVICE" = cuda ] && echo --compile)
step unet 500 "$PYTHON" $B/unet.py --device "$DEVICE" "${SMALL[@]}" --json "$OUT/unet.json" \
  $([ "$DEVICE" = cpu ] && echo --size 32 --no-compile)
rm -rf "$OUT/data/raw" "$OUT/data/tree"
exit $FAILED
