#!/usr/bin/env bash
# What wants a GPU, in one go: the tests of the kernels, then each GPU case, all in processes of their own.
#     benchmarks/gpu.sh                      everything, in order of worth: some ten minutes on 16 cores
#     benchmarks/gpu.sh tests head block     some of it
#     benchmarks/gpu.sh tune                 not part of everything: which launch of attention and gemv is fastest
# What fails does not stop the rest, and what is killed has told all it knew: $OUT (default: a new folder) gets a line of
# tests.jsonl for each test as it ends, of summary.txt for each step, and the measurements of benchmarks/results.
# Exit code 1 when anything failed. CASE_SECONDS limits each step, and is twice that for the tests.
set -u
cd "$(dirname "$0")/.."
export PYTHONPATH=".:kernels${PYTHONPATH:+:$PYTHONPATH}"
python=${PYTHON:-python3}
export OUT=${OUT:-$(mktemp -d)}
steps=${*:-tests attention_forward attention_forward_backward block head decode_step decode_ops prefix_sharing elementwise}
failed=0

# Workers share Triton's cache; a test that hangs ends its worker, and another takes its place.
plugins=(-p benchmarks.stream)
if "$python" -c "import xdist, pytest_timeout" 2>/dev/null; then
  plugins+=(-n "${WORKERS:-12}" --timeout=60 --timeout-method=thread)
fi

for name in $steps; do
  seconds=${CASE_SECONDS:-90}
  if [ "$name" = tests ]; then
    seconds=$((2 * seconds))
    files=(tests/kernels tests/test_step.py tests/test_generate.py tests/test_weights.py tests/test_benchmarks_ops.py)
    command=("$python" -m pytest -m "${MARK:-gpu}" -q "${plugins[@]}" "${files[@]}")  # a GPU's machine may lack what others import
  elif [ "$name" = tune ]; then
    ops=attention_forward,attention_dkdv,attention_dq,gemv_half,gemv_int8,gemv_int4
    command=("$python" -m benchmarks.tune --op "$ops")
  else
    command=("$python" -m benchmarks.run --case "$name")
  fi
  start=$SECONDS
  timeout "$seconds" "${command[@]}" >"$OUT/$name.tmp" 2>&1
  code=$?
  {
    echo "$name: $((SECONDS - start)) s, exit code $code"
    case $name in
      tests) grep -c '"passed"' "$OUT/tests.jsonl"; grep '"failed"' "$OUT/tests.jsonl" | cut -c 1-300 ;;
      tune) grep -v '^{' "$OUT/$name.tmp" ;;
      *) if [ $code -eq 0 ]; then grep -v '^{' "$OUT/$name.tmp"; else tail -n 1 "$OUT/$name.tmp" | cut -c 1-300; fi ;;
    esac
  } >>"$OUT/summary.txt"
  cat "$OUT/$name.tmp" >>"$OUT/output.txt"
  rm "$OUT/$name.tmp"
  [ $code -eq 0 ] || failed=1
  if [ -d benchmarks/results ]; then cp -r benchmarks/results "$OUT/"; fi
done

cat "$OUT/summary.txt"
echo "full output: $OUT"
exit $failed
