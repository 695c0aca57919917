#!/usr/bin/env bash
# What wants a GPU, in one go: the tests of the kernels, then each GPU case, all in processes of their own.
#     benchmarks/gpu.sh                      everything
#     benchmarks/gpu.sh tests head block     some of it
#     benchmarks/gpu.sh tune                 not part of everything: which launch of attention and gemv is fastest
# What fails does not stop the rest. Full output and the measurements of benchmarks/results go to $OUT (default: a new
# folder), and a short table comes last. Exit code 1 when anything failed. CASE_SECONDS limits each of them.
set -u
cd "$(dirname "$0")/.."
export PYTHONPATH=".:kernels${PYTHONPATH:+:$PYTHONPATH}"
python=${PYTHON:-python3}
out=${OUT:-$(mktemp -d)}
failed=0

for name in ${*:-tests attention_forward attention_forward_backward prefix_sharing head block elementwise decode_ops decode_step}; do
  if [ "$name" = tests ]; then
    files=(tests/kernels tests/test_step.py tests/test_generate.py tests/test_weights.py tests/test_benchmarks_ops.py)
    command=("$python" -m pytest -m gpu -q "${files[@]}")  # not all: a machine with a GPU may lack what others import
  elif [ "$name" = tune ]; then
    ops=attention_forward,attention_dkdv,attention_dq,gemv_half,gemv_int8,gemv_int4
    command=("$python" -m benchmarks.tune --op "$ops")
  else
    command=("$python" -m benchmarks.run --case "$name")
  fi
  start=$SECONDS
  timeout "${CASE_SECONDS:-300}" "${command[@]}" >"$out/$name.txt" 2>"$out/$name.err"
  code=$?
  {
    echo "$name: $((SECONDS - start)) s, exit code $code"
    if [ "$name" = tests ]; then
      grep -E '^(FAILED|ERROR)|(passed|failed|skipped)' "$out/$name.txt" | tail -n 20 | cut -c 1-200
    elif [ $code -ne 0 ]; then
      tail -n 1 "$out/$name.err" | cut -c 1-300
    elif [ "$name" = tune ]; then
      grep -v '^{' "$out/$name.txt"
    else
      grep -E '^  (limits|.*, without )' "$out/$name.txt" | cut -c 1-160
      sed -n '/ratio  target$/,/^$/p' "$out/$name.txt" | grep -v '^{'
    fi
  } >>"$out/summary.txt"
  [ $code -eq 0 ] || failed=1
  if [ -d benchmarks/results ]; then cp -r benchmarks/results "$out/"; fi
done

cat "$out/summary.txt"
echo "full output: $out"
exit $failed
