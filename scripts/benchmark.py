"""
Measure side by side, in one process and on the same weights.

    python scripts/benchmark.py inference --output_dir benchmarks/results
    python scripts/benchmark.py inference --image_sizes 224 384 512 --batch_sizes 1 --runtimes eager \
        --output_dir benchmarks/results/resolutions
    python scripts/benchmark.py inference --architecture vit_base_patch16_384 --image_sizes 384 --batch_sizes 4
    python scripts/benchmark.py profile --output_dir benchmarks/results

`inference`: images per second, latency, peak memory and share of the machine's matrix-multiply rate of Transformers,
timm, and this package eager, compiled and on ONNX Runtime in fp32 and int8, at several schedules. On two CPU cores the
first command takes about a quarter of an hour. Leave the machine alone meanwhile.

`profile`: in which operations the eager forms spend their time.

With `--output_dir`, writes inference.json and inference.png, or profile.json. The last line printed is the results as
JSON.
"""

import json
import sys
from pathlib import Path

from tnt_hf.command_line import clear_errors, parse_recipe_and_flags
from tnt_hf.inference_benchmark import (
    InferenceBenchmarkArguments,
    plot_inference,
    profile_inference,
    run_inference_benchmark,
)


BENCHMARKS = {"inference": run_inference_benchmark, "profile": profile_inference}


def main() -> None:
    with clear_errors():
        name = sys.argv[1] if len(sys.argv) > 1 else None
        if name not in BENCHMARKS:
            raise ValueError(f"The first argument must be {' or '.join(BENCHMARKS)}, got {name}.")
        (arguments,) = parse_recipe_and_flags((InferenceBenchmarkArguments,), sys.argv[2:])
        if arguments.output_dir is not None:
            Path(arguments.output_dir).mkdir(parents=True, exist_ok=True)
    results = BENCHMARKS[name](arguments)
    if arguments.output_dir is not None:
        path = Path(arguments.output_dir) / f"{name}.json"
        path.write_text(json.dumps(results, indent=2) + "\n")
        if name == "inference":
            plot_inference(results, path.with_suffix(".png"))
    print(json.dumps(results))


if __name__ == "__main__":
    main()
