"""
Measure side by side, in one process and on the same weights.

    python -m benchmarks accuracy --output_dir benchmarks/results
    python -m benchmarks accuracy --dataset_name data/cluttered --model_name_or_path examples/cluttered_backbone
    python -m benchmarks accuracy --dataset_name ILSVRC/imagenet-1k --max_eval_samples 10000 \
        --model_name_or_path facebook/deit-base-distilled-patch16-224 --num_train_images 1281167
    python -m benchmarks inference --output_dir benchmarks/results
    python -m benchmarks inference --image_sizes 224 384 512 --batch_sizes 1 --runtimes eager \
        --output_dir benchmarks/results/resolutions
    python -m benchmarks inference --architecture vit_base_patch16_384 --image_sizes 384 --batch_sizes 4
    python -m benchmarks profile --output_dir benchmarks/results
    python -m benchmarks training --output_dir benchmarks/results

`accuracy`: top-1 at equal executed GFLOPs of the unpruned model, random and [CLS]-attention selection, bipartite
merging, sort-prune-merge, and of scoring heads that are trained here by each recipe, once for each seed.

`inference`: images per second, latency, peak memory and share of the machine's matrix-multiply rate of Transformers,
timm, and this package eager, compiled and on ONNX Runtime in fp32 and int8, at several schedules. On two CPU cores it
takes about a quarter of an hour. Leave the machine alone meanwhile. `benchmarks/gpu.sh` runs it on a GPU.

`profile`: in which operations the eager forms spend their time.

`training`: time and peak memory of a step of the scoring heads beside fine-tuning and a forward pass, and the images/s
that the input pipeline reads.

With `--output_dir`, writes NAME.json and, of `accuracy` and `inference`, a plot NAME.png. The last line printed is the
results as JSON.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

from tnt_hf.command_line import clear_errors, needing_extra, parse_recipe_and_flags
from tnt_hf.results import write_json


with needing_extra("benchmark"):
    from benchmarks.inference import (
        InferenceBenchmarkArguments,
        plot_inference,
        profile_inference,
        run_inference_benchmark,
    )


Benchmark = tuple[tuple[type, ...], Callable, Callable | None]


def _accuracy() -> Benchmark:
    from benchmarks.accuracy import AccuracyBenchmarkArguments, plot_accuracy_benchmark, run_accuracy_benchmark
    from tnt_hf.data import DataArguments

    return (AccuracyBenchmarkArguments, DataArguments), run_accuracy_benchmark, plot_accuracy_benchmark


def _training() -> Benchmark:
    from benchmarks.training import TrainingBenchmarkArguments, run_training_benchmark

    return (TrainingBenchmarkArguments,), run_training_benchmark, None


# The arguments of each, what runs it and what plots it. Only those of the speed go without packages that read data.
BENCHMARKS: dict[str, Callable[[], Benchmark]] = {
    "accuracy": _accuracy,
    "inference": lambda: ((InferenceBenchmarkArguments,), run_inference_benchmark, plot_inference),
    "profile": lambda: ((InferenceBenchmarkArguments,), profile_inference, None),
    "training": _training,
}


def main() -> None:
    with clear_errors():
        name = sys.argv[1] if len(sys.argv) > 1 else None
        if name not in BENCHMARKS:
            raise ValueError(f"The first argument must be one of {', '.join(BENCHMARKS)}, got {name}.")
        with needing_extra("benchmark"):
            argument_types, run, plot = BENCHMARKS[name]()
        arguments = parse_recipe_and_flags(argument_types, sys.argv[2:])
        output_dir = arguments[0].output_dir
        if output_dir is not None:
            Path(output_dir).mkdir(parents=True, exist_ok=True)
    results = run(*arguments)
    if output_dir is not None:
        path = write_json(Path(output_dir) / f"{name}.json", results)
        if plot is not None:
            plot(results, path.with_suffix(".png"))
    print(json.dumps(results))


if __name__ == "__main__":
    main()
