#!/usr/bin/env bash
# Runs the paper's seven experiments one after the other and prints the results table beside the paper's.
#
#   bash run_all.sh --smoke                  # minutes, offline: synthetic images, narrow networks
#   bash run_all.sh --data-dir DIR           # the experiments themselves; every flag of hirelc.py is passed on
#   bash run_all.sh --seeds 42,43,44         # each experiment with each seed
#   bash run_all.sh --restart                # begin anew what was broken off, and what is finished
#
# What is finished is left as it is, and what was broken off goes on where it was.
# Where torch cannot be imported, a virtual environment with requirements.txt is made in .venv first. A failed
# experiment does not stop the others; the exit code is then 1.
set -u
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

seeds="42" out="" smoke=0 mode="--resume" flags=()
while [ $# -gt 0 ]; do
  case "$1" in
    --seeds|--seed|--out)
      [ $# -ge 2 ] || { echo "run_all: $1 needs a value" >&2; exit 2; }
      if [ "$1" = --out ]; then out="$2"; else seeds="${2//,/ }"; fi
      shift 2 ;;
    --seeds=*|--seed=*) seeds="${1#*=}"; seeds="${seeds//,/ }"; shift ;;
    --out=*) out="${1#*=}"; shift ;;
    --exp|--exp=*|--list) echo "run_all: $1 belongs to hirelc.py; run_all.sh runs all seven" >&2; exit 2 ;;
    --resume|--restart) mode="$1"; shift ;;
    --smoke) smoke=1; flags+=("$1"); shift ;;
    --help|-h) sed -n '2,12s/^# \{0,1\}//p' "$0"; exit 0 ;;
    *) flags+=("$1"); shift ;;
  esac
done
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

failed=()
trap 'echo "run_all: stopped" >&2; exit 130' INT
for seed in $seeds; do
  for exp in 1 2 3 4 5 6 7; do
    "$python" "$here/hirelc.py" --exp "$exp" --seed "$seed" --out "$out" --no-table "$mode" ${flags[@]+"${flags[@]}"}
    code=$?
    [ "$code" -ne 130 ] && [ "$code" -ne 143 ] || exit "$code"
    [ "$code" -eq 0 ] || failed+=("exp $exp seed $seed (exit $code)")
  done
done

echo
"$python" "$here/report.py" "$out" || failed+=("results table")
[ ${#failed[@]} -eq 0 ] || { printf 'run_all: failed: %s\n' "${failed[@]}" >&2; exit 1; }
