#!/usr/bin/env bash
# Correctness and speed on an NVIDIA GPU, in under eight minutes.
#
#     OUT=runs/gpu benchmarks/gpu.sh
#
# PYTHON must have PyTorch for CUDA, Transformers, timm, matplotlib and pytest, and nvidia-ml-py for energy. No network
# and no installation of tnt-hf is needed; the wheels in the folder that WHEELS names, if any, are put beside what PYTHON
# has. The runs come in the order of their importance, within SECONDS_IN_ALL; those that no time is left for are named.
# OUT gets tests.log and the JSON of each run; the status is that of the tests.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
OUT=${OUT:-runs/gpu}
SECONDS_IN_ALL=${SECONDS_IN_ALL:-470}
mkdir -p "$OUT"
export PYTHONPATH=$PWD HF_HUB_OFFLINE=1
if [ -n "${WHEELS:-}" ]; then
    site=$(mktemp -d)
    "$PYTHON" -m pip install --quiet --no-index --no-deps --upgrade --target "$site" "$WHEELS"/*.whl || exit 1
    export PYTHONPATH=$PYTHONPATH:$site
fi

# NAME FLAGS: the last line printed is the results.
measure() {
    local name=$1 left=$((SECONDS_IN_ALL - SECONDS))
    shift
    if [ "$left" -gt 0 ] && timeout "$left" "$PYTHON" -m benchmarks inference --device cuda --token_reduction cluster \
        --num_rounds 15 "$@" 2> "$OUT/errors.txt" | tail -n 1 > "$OUT/$name.json" && [ -s "$OUT/$name.json" ]; then
        echo "$name: measured, $SECONDS s in all"
    else
        rm -f "$OUT/$name.json"
        echo "$name: not measured, $left s were left"
        tail -n 3 "$OUT/errors.txt"
    fi
}

deit=deit_base_distilled_patch16_224
half=(--dtype bfloat16 --schedules full 2x)
graphs=(--runtimes "Transformers CUDA graphs" "CUDA graphs")
budgets=(--batch_sizes 1 32 256 --schedules full 1.43x 2x 2.86x --runtimes "timm eager" eager "Token Merging eager")

timeout "$SECONDS_IN_ALL" "$PYTHON" -m pytest -q --noconftest -p no:cacheprovider tests/test_cuda.py 2>&1 |
    tee "$OUT/tests.log"
status=$?
measure deit_base_256 --architecture $deit --batch_sizes 256 "${half[@]}" --runtimes eager "Transformers compiled" compiled
measure deit_base_1 --architecture $deit --batch_sizes 1 "${half[@]}" "${graphs[@]}"
measure dinov2_base_256 --architecture dinov2-base --batch_sizes 256 "${half[@]}" --runtimes eager
measure dinov2_base_518 --architecture dinov2-base --image_sizes 518 --batch_sizes 1 "${half[@]}" "${graphs[@]}"
measure bfloat16 --dtype bfloat16 "${budgets[@]}"
measure long --dtype bfloat16 --architecture vit_small_patch16_224 --image_sizes 768 --batch_sizes 32 --schedules 2x \
    --runtimes eager "eager, sizes in mask" "eager, sizes in keys"
measure float16 --dtype float16 "${budgets[@]}"
measure graphs_32 --dtype bfloat16 --batch_sizes 32 --schedules 1.43x 2x 2.86x "${graphs[@]}"
exit $status
