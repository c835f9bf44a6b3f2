#!/usr/bin/env bash
# Runs the paper's seven experiments one after the other and makes the report: OUT/report.html, results.md and csv/.
#
#   bash run_all.sh --smoke                  # minutes, offline: synthetic images, narrow networks
#   bash run_all.sh --data-dir DIR           # the experiments themselves; every flag of hirelc.py is passed on
#   bash run_all.sh --seeds 42 43 44         # each experiment with each seed; mean and standard deviation in the report
#   bash run_all.sh --paper                  # the ablations and baselines of experiment 4 too (evidence/variants.py);
#                                            # with the first seed the paper's ablations, of experiment 1
#   bash run_all.sh --jobs 2                 # two at once, each with its log; 1 unless --smoke, whose runs take one
#                                            # thread each: then as many as there are cores, at most 4
#   bash run_all.sh --restart                # begin anew what was broken off, and what is finished
#
# By itself it leaves what is finished as it is, and goes on with what was broken off. Without torch it makes a virtual
# environment in .venv first. A failed experiment does not stop the others; the exit code is then 1.
set -u
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

seeds="42" out="" jobs="" smoke=0 paper=0 mode="--resume" flags=()
while [ $# -gt 0 ]; do
  case "$1" in
    --seeds|--seed|--out|--jobs)
      [ $# -ge 2 ] || { echo "run_all: $1 needs a value" >&2; exit 2; }
      case "$1" in --jobs) jobs="$2"; shift 2; continue;; --out) out="$2"; shift 2; continue;; esac
      seeds="${2//,/ }"
      shift 2
      while [[ "${1:-}" =~ ^[0-9][0-9,]*$ ]]; do seeds="$seeds ${1//,/ }"; shift; done ;;
    --seeds=*|--seed=*) seeds="${1#*=}"; seeds="${seeds//,/ }"; shift ;;
    --out=*) out="${1#*=}"; shift ;;
    --jobs=*) jobs="${1#*=}"; shift ;;
    --exp|--exp=*|--list) echo "run_all: $1 belongs to hirelc.py; run_all.sh runs all seven" >&2; exit 2 ;;
    --resume|--restart) mode="$1"; shift ;;
    --paper) paper=1; shift ;;
    --smoke) smoke=1; flags+=("$1"); shift ;;
    --help|-h) sed -n '2,16s/^# \{0,1\}//p' "$0"; exit 0 ;;
    *) flags+=("$1"); shift ;;
  esac
done
[[ "$seeds" =~ ^[0-9][0-9\ ]*$ ]] || { echo "run_all: --seeds $seeds: expected whole numbers" >&2; exit 2; }
[ -n "$out" ] || { if [ "$smoke" = 1 ]; then out="runs-smoke"; else out="runs"; fi; }

usable() { "$1" -c 'import torch, torchvision, numpy' >/dev/null 2>&1; }
python="${PYTHON:-python3}"
if [ -x "$here/.venv/bin/python" ] && usable "$here/.venv/bin/python"; then
  python="$here/.venv/bin/python"
elif ! usable "$python"; then
  echo "torch cannot be imported: setting up $here/.venv (a download of several GB, once)"
  "$python" -m venv "$here/.venv" && "$here/.venv/bin/python" -m pip install --quiet -r "$here/requirements.txt" ||
    { echo "run_all: could not set up $here/.venv; install requirements.txt by hand and run again" >&2; exit 1; }
  python="$here/.venv/bin/python"
fi
export PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}"  # and -P: evidence.report is found whatever the working directory

if [ -z "$jobs" ]; then
  jobs=1
  [ "$smoke" = 0 ] || { jobs="$(env -u OMP_NUM_THREADS nproc 2>/dev/null || echo 1)"; [ "$jobs" -le 4 ] || jobs=4; }
fi
[[ "$jobs" =~ ^[1-9][0-9]?$ ]] || { echo "run_all: --jobs $jobs: expected a number from 1 to 99" >&2; exit 2; }

# start TITLE ARGUMENTS...: one at a time as it is, several at once in the background, their last lines when they end
failed=() titles=() pids=() logs=()
stop() {  # runs in the background save their state and end
  trap '' INT TERM
  [ ${#pids[@]} -eq 0 ] || { kill "${pids[@]}" 2>/dev/null; wait "${pids[@]}"; rm -f "${logs[@]}"; }
  echo "run_all: stopped" >&2
  exit "$1"
}
trap 'stop 130' INT
trap 'stop 143' TERM
ended() {  # title, exit code
  [ "$2" -ne 130 ] && [ "$2" -ne 143 ] || stop "$2"
  [ "$2" -eq 0 ] || failed+=("$1 (exit $2)")
}
collect() {  # the runs that have ended; waits until fewer than $1 are left
  while [ ${#pids[@]} -ge "$1" ] && [ ${#pids[@]} -gt 0 ]; do
    wait -n 2>/dev/null || sleep 0.2
    for i in "${!pids[@]}"; do
      kill -0 "${pids[$i]}" 2>/dev/null && continue
      wait "${pids[$i]}"
      local code=$? title="${titles[$i]}" log="${logs[$i]}"
      unset "pids[$i]" "titles[$i]" "logs[$i]"
      echo "$title: $(tail -n 1 "$log")"
      rm -f "$log"
      ended "$title" "$code"
    done
  done
}
start() {
  local title="$1" log
  shift
  if [ "$jobs" = 1 ]; then
    "$python" "$@"
    ended "$title" $?
    return
  fi
  collect "$jobs"
  log="$(mktemp)"
  set -m  # in a process group of its own: Ctrl-C reaches it once, through stop
  "$python" "$@" >"$log" &  # what goes to stderr is seen at once
  set +m
  pids+=($!) titles+=("$title") logs+=("$log")
}
common=(--out "$out" --no-table "$mode" ${flags[@]+"${flags[@]}"})
ablations() {
  [ "$paper" = 1 ] || return 0
  start "ablations and baselines of experiment 4" -P -m evidence.variants --exp 4 --seeds $seeds "${common[@]}"
  start "the paper's ablations of experiment 1" -P -m evidence.variants --exp 1 --seeds "${seeds%% *}" \
    --only no-hla a2c no-sens "${common[@]}"
}
[ "$jobs" -eq 1 ] || ablations  # the longest goes first
for seed in $seeds; do
  for exp in 1 2 3 4 5 6 7; do
    start "exp $exp seed $seed" "$here/hirelc.py" --exp "$exp" --seed "$seed" "${common[@]}"
  done
done
[ "$jobs" -gt 1 ] || ablations
collect 1

echo
"$python" -P -m evidence.report "$out" || failed+=("report")
[ ${#failed[@]} -eq 0 ] || { printf 'run_all: failed: %s\n' "${failed[@]}" >&2; exit 1; }
