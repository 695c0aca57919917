#!/usr/bin/env bash
# What wants a GPU, in order of worth, each step in processes of its own:
#     benchmarks/gpu.sh                      the tests of the kernels and the cases: within 9 minutes on 16 cores
#     benchmarks/gpu.sh quick                the tests and what a user waits for: within 4 minutes
#     benchmarks/gpu.sh tests head block     some of it
#     benchmarks/gpu.sh training_step        not part of everything: a step without trl around it and the optimizer
#     benchmarks/gpu.sh tune                 not part of everything: which launch of attention, LoRA and quantised products is fastest
# It may be killed at any moment: results.txt and results.jsonl in $OUT (default: a new folder) tell each test, each
# measurement and each step as it ends (benchmarks/stream.py), output.txt has all that was printed. Exit code 1 when
# anything failed.
# All steps share LIMIT seconds. A step may take its share of those left, by weight, so none takes from those behind it.
set -u
cd "$(dirname "$0")/.."
export PYTHONPATH=".:kernels${PYTHONPATH:+:$PYTHONPATH}"
export OUT=${OUT:-$(mktemp -d)}
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$PWD/build/triton}  # one for all steps, torch.compile's too, and for the next visit
python=${PYTHON:-python3}

all="tests gpu_dpo_step_vs_trl gpu_decode_vs_transformers gpu_sft_step_vs_trl decode_loop decode_step
attention_forward_backward attention_forward attention_as_sm80 attention_packed head block decode_ops quantized_matmul
prefix_sharing elementwise gpu_dpo_passes"
limit=525 steps=$*
case $steps in
  "") steps=$all ;;
  quick) limit=225 steps="tests gpu_dpo_step_vs_trl gpu_decode_vs_transformers decode_loop" ;;
esac
limit=${LIMIT:-$limit}

weight() {
  case $1 in
    tests) echo 9 ;;
    gpu_dpo_step_vs_trl) echo 7 ;;  # it starts both libraries twice
    gpu_decode_vs_transformers) echo 5 ;;
    gpu_sft_step_vs_trl | gpu_dpo_passes) echo 4 ;;
    training_step | block | decode_loop | decode_step | tune) echo 3 ;;
    *) echo 2 ;;
  esac
}

# A test that hangs ends its worker, and another worker takes its place.
flags=(-q -p benchmarks.stream)
case $("$python" -c "from importlib.util import find_spec as has; print(has('xdist') and 1, has('pytest_timeout') and 1)") in
  "1 1") flags+=(-n 12 --timeout=30 --timeout-method=thread) ;;
  "1 None") flags+=(-n 12) ;;
  "None 1") flags+=(--timeout=30) ;;
esac
read -ra files <<<"${TESTS:--m gpu tests/kernels tests/test_step.py tests/test_run_ahead.py tests/test_generate.py tests/test_passes.py tests/test_weights.py tests/test_benchmarks_ops.py}"

command_of() {
  case $1 in
    tests) command=("$python" -m pytest "${flags[@]}" "${files[@]}") ;;
    tune) command=("$python" -m benchmarks.tune attention_{forward,dkdv,dq} lora_{inner,add,gradients} gemv_{half,int8,int4} quantized_{forward,backward}) ;;
    *) command=("$python" -m benchmarks.run --case "$1") ;;
  esac
}

touch "$OUT/results.txt" "$OUT/results.jsonl" "$OUT/output.txt"
child= failed=0 waiting=0
trap '[ -z "$child" ] || { kill "$child"; wait "$child"; }; exit 143' TERM INT HUP  # `timeout` leads and ends a group
for name in $steps; do waiting=$((waiting + $(weight "$name"))); done
for name in $steps; do
  share=$(((limit - SECONDS) * $(weight "$name") / waiting))
  waiting=$((waiting - $(weight "$name")))
  told=$(wc -l <"$OUT/results.txt") printed=$(wc -l <"$OUT/output.txt") start=$SECONDS
  command_of "$name"
  timeout -k 5 "$((share > 1 ? share : 1))" "${command[@]}" >>"$OUT/output.txt" 2>&1 &
  child=$!
  wait "$child"
  code=$?
  child=
  [ $code -eq 0 ] || failed=1
  tail -n +$((printed + 1)) "$OUT/output.txt" | "$python" -m benchmarks.stream "$name" $((SECONDS - start)) $code
  tail -n +$((told + 1)) "$OUT/results.txt"
done
echo "all results: $OUT"
exit $failed
