#!/usr/bin/env bash
# The first minutes on a GPU, most telling results first: one call of 600 s at most that decides what is done next.
#
#   bash bench/first_light.sh                          all parts, in this order; needs a GPU, no network, no install
#   bash bench/first_light.sh --rehearse               the same code with small shapes, on any machine, in a minute
#   LIMIT=200 bash bench/first_light.sh operators steps layouts     some of the parts, in little time
#   VARIANTS="mix_order combo" bash bench/first_light.sh techniques  with options of Inductor as rows
#
#   ceilings   copy, a large product, the step's own products: the true floor of a step              45 s at most
#   operators  go or no-go: every kernel at its real shape against float64, repeats, races           100 s
#   steps      both stages, batch 64: compiled, CUDA graph, eager; waits, equality, profile          190 s
#   techniques  a graphed step of both stages without each technique, and under options of Inductor  120 s
#   layouts    the decoder's self-attention in raster and in order layout: which one stays            65 s
#   rivals     the other kernels beside torch.compile in replayed graphs, and under ncu               80 s
#
# Every result is printed and appended to its part's CSV at once. A part that fails or runs out of its time leaves what
# it has and does not stop the others; what a part leaves of its time is the next ones'. OUT is where CSV files, profiles
# and the log go (bench/results; a rehearsal's to a new folder); LIMIT the seconds of all parts together (600; races are
# searched for from 300); COMMIT names the commit where the checkout came without its history; VARIANTS what
# `techniques.py` has as rows beyond the techniques (mix_order). Exit code: 0, 1 where something is no go, failed or ran
# out of time, 2 where nothing was begun.
set -uo pipefail
cd "$(dirname "$0")/.."
SECONDS=0
LIMIT=${LIMIT:-600}
VARIANTS=${VARIANTS-mix_order}
PYTHON=${PYTHON:-python3}
export PYTHONPATH=.:kernels PYTHONUNBUFFERED=1
# what is compiled ahead of its part is found there again
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-${TMPDIR:-/tmp}/first_light_inductor}

refuse() {
  echo "error: $1" >&2
  exit 2
}

rehearse=()
parts=()
for word in "$@"; do
  case $word in
  --rehearse) rehearse=(--rehearse) ;;
  ceilings | operators | steps | techniques | layouts | rivals) parts+=("$word") ;;
  *) refuse "unknown part $word: use ceilings, operators, steps, techniques, layouts, rivals, or --rehearse" ;;
  esac
done
[ ${#parts[@]} -gt 0 ] || parts=(ceilings operators steps techniques layouts rivals)
[[ $LIMIT =~ ^[1-9][0-9]{0,4}$ ]] || refuse "LIMIT=$LIMIT is no number of seconds: use 600, or leave it out"
"$PYTHON" -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else 9)'
case $? in
0) ;;
9) [ ${#rehearse[@]} -gt 0 ] || refuse "there is no GPU here: add --rehearse for a rehearsal on this machine" ;;
*) refuse "PYTHON=$PYTHON cannot import torch: name one that can" ;;
esac
if [ ${#rehearse[@]} -gt 0 ]; then
  OUT=${OUT:-$(mktemp -d)} # figures of a rehearsal say nothing
else
  OUT=${OUT:-bench/results}
fi
mkdir -p "$OUT" 2>/dev/null && [ -w "$OUT" ] || refuse "OUT=$OUT cannot be written to: name another folder"
# what belongs together in the CSV files
export FIRST_LIGHT_RUN
FIRST_LIGHT_RUN=$(date '+%Y-%m-%d %H:%M:%S')
exec > >(tee -a "$OUT/first_light.txt") 2>&1
echo "run $FIRST_LIGHT_RUN, results in $OUT"

left() { echo $((LIMIT - SECONDS)); }

travels=$(git ls-files -z -co --exclude-standard 2>/dev/null | xargs -0r stat -c %s 2>/dev/null |
  awk '{ bytes += $1 } END { if (bytes) printf "%.1f", bytes / 1048576 }')
[ -z "$travels" ] || echo "travels: $travels MiB of 64"

# A process of a part: its script, at most so many seconds, further words.
limited() {
  local name=$1 seconds=$2
  shift 2
  [ "$seconds" -le "$(left)" ] || seconds=$(left)
  [ "$seconds" -ge 5 ] || {
    echo "$name: no time is left"
    return 124
  }
  timeout -s INT -k 8 "$seconds" "$PYTHON" "bench/first_light/$name.py" --out "$OUT" --seconds "$seconds" "$@" \
    "${rehearse[@]}"
}

# Compilers work while the operators are checked, which times nothing; what they make is found on disk afterwards.
warming=()
warm_up() {
  [ ${#rehearse[@]} -eq 0 ] || return 0
  case " ${parts[*]} " in *" steps "*)
    "$PYTHON" bench/first_light/steps.py --stage 1 --warm >/dev/null &
    warming+=($!)
    "$PYTHON" bench/first_light/steps.py --stage 2 --warm >/dev/null &
    warming+=($!)
    ;;
  esac
  case " ${parts[*]} " in *" rivals "*)
    "$PYTHON" bench/first_light/rivals.py --warm >/dev/null &
    warming+=($!)
    ;;
  esac
}

# Waits for them, so that nothing else runs beside what is timed, but not for ever.
quiet() {
  local until=$((SECONDS + 45)) pid
  for pid in "${warming[@]}"; do
    while kill -0 "$pid" 2>/dev/null && [ $SECONDS -lt $until ]; do sleep 0.3; done
    kill -9 "$pid" 2>/dev/null && echo "note: what was compiled ahead took too long"
  done
  warming=()
}

ceilings() { limited ceilings 45; }
operators() {
  local jobs=(--jobs 8)
  [ ${#rehearse[@]} -eq 0 ] || jobs=(--jobs 0)
  [ "$LIMIT" -ge 300 ] || jobs+=(--no-races)
  limited operators 100 "${jobs[@]}"
}
steps() {
  local code=0
  limited steps 95 --stage 1 || code=$?
  limited steps 95 --stage 2 || code=$?
  return $code
}
techniques() {
  local words=(--variants)
  # shellcheck disable=SC2206
  [ ${#rehearse[@]} -gt 0 ] && words+=(--stages 1) || words+=($VARIANTS)
  limited techniques 120 "${words[@]}"
}
layouts() { limited layouts 65; }
rivals() { limited rivals 80; }

status=0
summary=()
for part in "${parts[@]}"; do
  case $part in
  operators) warm_up ;;
  *) [ ${#warming[@]} -eq 0 ] || quiet ;;
  esac
  began=$SECONDS
  echo "== $part"
  code=0
  "$part" || code=$?
  summary+=("$part: exit code $code, $((SECONDS - began)) s")
  [ $code -eq 0 ] || status=1
done
[ ${#warming[@]} -eq 0 ] || quiet
echo "== done in $SECONDS s"
printf '%s\n' "${summary[@]}"
"$PYTHON" bench/first_light/table.py --last --run "$FIRST_LIGHT_RUN" "$OUT"/first_light_*.csv
exit $status
