#!/usr/bin/env bash
# What is decided on a GPU after the first minutes (bench/first_light.sh), a part a call; from the checkout as it is:
# nothing is installed but carried wheels, nothing is compiled.
#
#   bash bench/gpu_check.sh correct | techniques | tiles | growth | decoding | scenes | photos
#
#   correct     whether the whole suite holds on this card, kernels and steps first
#   techniques  what each technique of a training step brings: the ladder from the reference to the whole stack, and the
#               minutes that COCO would take
#   tiles       whether other tiles, warps and stages are faster than those in the kernels' tables, and all iterations in
#               one kernel than a launch a step
#   growth      how a step's time and memory grow with images, tokens and slots
#   decoding    whether DALI decodes as fast as a step trains, caches and evaluation beside it; once all pieces of
#               `prepare_gpu.py --dali` have come
#   scenes      the README's results on a GPU, three seeds: python -m spot_fast.reproduce 1
#   photos      whether the paper's Table 1 holds in small, three seeds; needs the folder that bench/prepare_gpu.py makes
#
# A part keeps within MINUTES (8.5), and so do several parts in one call together; scenes and photos go on where they
# stopped when they are called again. OUT is where the CSV files go (bench/results), STORE what has to survive between
# calls: runs, weights, photos (/tmp/spot_gpu). QUICK=1 is a rehearsal on any machine (DEVICE=cpu). Exit code: 0, or
# that of the last part that failed (1 target or test missed, 3 call again, 124 out of time).
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-bench/results}
STORE=${STORE:-/tmp/spot_gpu}
GPU=${GPU:-.gpu}
MINUTES=${MINUTES:-8.5}
PYTHON=${PYTHON:-python3}
DEVICE=${DEVICE:-cuda}
export PYTHONPATH=.:kernels:$STORE/site PYTHONUNBUFFERED=1
PARTS="correct techniques tiles growth decoding scenes photos"
if [ $# -eq 0 ]; then
  echo "error: say which part: ${PARTS// /, }" >&2
  exit 2
fi
mkdir -p "$OUT" "$STORE"

# The folder of a call is gone in the next one: keep what it carried.
shopt -s nullglob
for folder in "$GPU"/base "$GPU"/photos "$GPU"/dali-*-of-*; do
  [ ! -d "$folder" ] || cp -r "$folder" "$STORE/"
done
shopt -u nullglob
if ! "$PYTHON" -c 'import pycocotools' 2>/dev/null; then
  if compgen -G "$STORE/base/wheels/*.whl" >/dev/null; then
    "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --target "$STORE/site" "$STORE"/base/wheels/*.whl
  else
    echo "note: pycocotools is missing and no wheel was carried: tests and photos that read COCO masks will fail"
  fi
fi
"$PYTHON" -c 'import torch; cuda = torch.cuda
print("torch", torch.__version__, "on", cuda.get_device_name() if cuda.is_available() else "no GPU")'

end=$(awk -v now="$EPOCHSECONDS" -v m="$MINUTES" 'BEGIN { print int(now + 60 * m) }')
seconds_left() { echo $((end - EPOCHSECONDS > 1 ? end - EPOCHSECONDS : 1)); }
minutes_left() { awk -v s="$(seconds_left)" 'BEGIN { print s / 60 }'; }

# Out of time, tests and benchmarks are interrupted: they still say what they have. The kernels are compiled, whatever
# the caller's shell says.
limited_pytest() {
  local seconds=$1
  shift
  [ "$seconds" -lt "$(seconds_left)" ] || seconds=$(seconds_left)
  env -u TRITON_INTERPRET timeout -s INT -k 15 "$seconds" "$PYTHON" -m pytest -q -p no:cacheprovider -m "" "$@"
}

correct() {
  local first=() workers=() name
  shopt -s nullglob
  for name in slot_attention permuted_attention order_layout slot_cross_attention shift_by_order mask_matching gru_norm linear_relu add_norm clipped_adam modules drop_in; do
    first+=(tests/kernels/test_"$name"*.py)
  done
  shopt -u nullglob
  first+=(tests/training/test_compiled.py tests/training/test_step_sync.py tests/training/test_cuda_graph.py tests/training/test_bad_steps.py tests/training/test_precision.py)
  [ -z "${QUICK:-}" ] || first=(tests/model/test_patch_orders.py)
  # most of the time goes into compiling, one kernel a process
  ! "$PYTHON" -c 'import xdist' 2>/dev/null || workers=(-n "${WORKERS:-12}")
  limited_pytest "$(seconds_left)" "${workers[@]}" "${first[@]}" | tee "$OUT/tests_gpu.txt" || return $?
  [ -n "${QUICK:-}" ] || limited_pytest "$(seconds_left)" "${workers[@]}" -m 'not slow' | tee -a "$OUT/tests_gpu.txt"
}

techniques() {
  timeout -s INT -k 10 "$(seconds_left)" "$PYTHON" bench/ladder.py --device "$DEVICE" ${QUICK:+--tiny} \
    --csv "$OUT/ladder_gpu.csv" | tee "$OUT/ladder_gpu.md"
}

tiles() {
  [ -z "${QUICK:-}" ] || export TRITON_INTERPRET=1
  "$PYTHON" bench/studies/whole_iterations.py | tee "$OUT/whole_iterations_gpu.txt"
  "$PYTHON" bench/sweep.py --minutes "$(minutes_left)" ${QUICK:+--tiny --only slot_cross} | tee "$OUT/sweep_gpu.txt"
}

# Joins and installs the pieces of DALI that calls have brought; fails while one is missing.
install_dali() {
  ! "$PYTHON" -c 'import nvidia.dali' 2>/dev/null || return 0
  local pieces=() number count
  shopt -s nullglob
  pieces=("$STORE"/dali-*-of-*/piece)
  shopt -u nullglob
  count=${pieces[0]:-}
  count=${count%/piece}
  count=${count##*-of-}
  if [ "${#pieces[@]}" -eq 0 ] || [ "${#pieces[@]}" -lt "$count" ]; then
    echo "DALI is not here: ${#pieces[@]} of ${count:-all} pieces have come, see bench/prepare_gpu.py --dali"
    return 1
  fi
  mkdir -p "$STORE/dali-wheels"
  for number in $(seq "$count"); do cat "$STORE/dali-$number-of-$count/piece"; done | tar -x -C "$STORE/dali-wheels"
  "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --target "$STORE/site" "$STORE"/dali-wheels/*.whl
}

decoding() {
  install_dali || return 3
  limited_pytest 120 tests/data/test_dali_loader.py tests/data/test_prefetch.py tests/training/test_run_cache.py |
    tee "$OUT/data_tests_gpu.txt"
  "$PYTHON" bench/bench_data.py --device "$DEVICE" ${QUICK:+--tiny} --csv "$OUT" | tee "$OUT/data_gpu.txt"
}

growth() {
  timeout -s INT -k 10 "$(seconds_left)" "$PYTHON" bench/growth.py --device "$DEVICE" ${QUICK:+--tiny --steps 1} \
    --csv "$OUT/growth_gpu.csv" --plot "$OUT/growth_gpu.png" | tee "$OUT/growth_gpu.md"
}

scenes() {
  local seeds=(--seeds 0 1 2) quick=()
  [ -z "${QUICK:-}" ] || {
    seeds=(--seeds 0)
    quick=(-- --epochs 2 --train-images 64 --val-images 8 --batch-size 32 --warmup-steps 2 --eval-images 0)
  }
  "$PYTHON" -m spot_fast.reproduce 1 "${seeds[@]}" --runs "$STORE/scenes" --out "$OUT/scenes_gpu" --device "$DEVICE" \
    --threads 4 --jobs 3 --minutes "$(minutes_left)" "${quick[@]}" | tee "$OUT/scenes_gpu.md"
}

photos() {
  if [ ! -d "$STORE/photos" ] || [ ! -f "$STORE/base/encoder.safetensors" ]; then
    echo "skipped: bench/prepare_gpu.py makes $GPU, carry $GPU/base and $GPU/photos here"
    return 0
  fi
  local size=(--seeds 0 1 2 --steps "${STEPS:-10000}") quick=()
  [ -z "${QUICK:-}" ] || {
    size=(--seeds 0 --steps 2 --batch-size 4 --train-images 8 --val-images 4)
    quick=(-- --dec-blocks 1 --eval-images 0)
  }
  "$PYTHON" bench/photo_table.py --photos "$STORE/photos" --encoder-weights "$STORE/base/encoder.safetensors" \
    "${size[@]}" --out "$STORE/photo-runs" --csv "$OUT/photos_gpu.csv" --device "$DEVICE" --threads 2 \
    --jobs 6 --minutes "$(minutes_left)" "${quick[@]}" | tee "$OUT/photos_gpu.md"
}

status=0
summary=()
for part in "$@"; do
  case $part in correct | techniques | tiles | growth | decoding | scenes | photos) ;; *)
    echo "error: unknown part $part: use ${PARTS// /, }" >&2
    exit 2
    ;;
  esac
  SECONDS=0
  echo "== $part"
  code=0
  "$part" || code=$?
  summary+=("$part: exit code $code, $SECONDS s")
  [ "$code" -eq 0 ] || status=$code
done
printf '%s\n' "== done" "${summary[@]}"
exit "$status"
