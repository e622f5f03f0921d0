#!/usr/bin/env bash
# Correctness and speed on an NVIDIA GPU, in under eight minutes.
#
#     OUT=runs/gpu benchmarks/gpu.sh
#
# PYTHON must have PyTorch for CUDA, Transformers, timm, matplotlib and pytest. No network and no installation of
# tnt-hf is needed; the wheels in the folder that WHEELS names, if any, are put beside what PYTHON has. A run that
# exceeds its time is left out. OUT gets tests.log and the JSON of each run; the status is that of the tests.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
OUT=${OUT:-runs/gpu}
mkdir -p "$OUT"
export PYTHONPATH=$PWD HF_HUB_OFFLINE=1
if [ -n "${WHEELS:-}" ]; then
    site=$(mktemp -d)
    "$PYTHON" -m pip install --quiet --no-index --no-deps --upgrade --target "$site" "$WHEELS"/*.whl || exit 1
    export PYTHONPATH=$PYTHONPATH:$site
fi

# NAME SECONDS FLAGS: the last line printed is the results.
measure() {
    local name=$1 seconds=$2
    shift 2
    if timeout "$seconds" "$PYTHON" -m benchmarks inference --device cuda --token_reduction cluster "$@" \
        2> "$OUT/errors.txt" | tail -n 1 > "$OUT/$name.json" && [ -s "$OUT/$name.json" ]; then
        echo "$name: measured"
    else
        rm -f "$OUT/$name.json"
        echo "$name: not measured in $seconds s"
        tail -n 3 "$OUT/errors.txt"
    fi
}

budgets=(full 1.43x 2x 2.86x)
eager=("timm eager" eager "Token Merging eager")
graphs=("Transformers CUDA graphs" "CUDA graphs")
batches=(--batch_sizes 1 32 256)
rounds=(--num_rounds 15)

timeout 100 "$PYTHON" -m pytest -q --noconftest -p no:cacheprovider tests/test_cuda.py 2>&1 | tee "$OUT/tests.log"
status=$?
measure bfloat16 60 --dtype bfloat16 "${batches[@]}" "${rounds[@]}" --schedules "${budgets[@]}" --runtimes "${eager[@]}"
measure graphs_1 75 --dtype bfloat16 --batch_sizes 1 "${rounds[@]}" --schedules full 2x --runtimes eager "${graphs[@]}"
measure compiled_256 75 --dtype bfloat16 --batch_sizes 256 "${rounds[@]}" --schedules full 2x \
    --runtimes eager compiled "Transformers compiled"
measure long 30 --dtype bfloat16 --architecture vit_small_patch16_224 --image_sizes 768 --batch_sizes 32 \
    "${rounds[@]}" --schedules 2x --runtimes eager "eager, sizes in mask" "eager, sizes in keys"
measure float16 60 --dtype float16 "${batches[@]}" "${rounds[@]}" --schedules "${budgets[@]}" --runtimes "${eager[@]}"
measure graphs_32 75 --dtype bfloat16 --batch_sizes 32 "${rounds[@]}" --schedules 1.43x 2x 2.86x \
    --runtimes eager "${graphs[@]}"
exit $status
