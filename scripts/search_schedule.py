"""
Search for the pruning schedule that changes a trained TNT model's answers least at a given cost.

    python scripts/search_schedule.py --model_name_or_path runs/demo --gflops 0.12 --output_dir runs/search
    python scripts/search_schedule.py --model_name_or_path runs/demo --milliseconds 4 --output_dir runs/search-time
    python scripts/search_schedule.py --model_name_or_path runs/deit-small --gflops 3.2 --num_images 512 \
        --images_dir /data/photos --output_dir runs/deit-small-search --apply

`make demo` trains runs/demo, and the bundled images are used if none are named: the first command then takes a minute
or two on two CPU cores. Labels are not needed: schedules are ranked by how far the probabilities of the classes move
away from those of the unpruned model. Milliseconds are predicted from a short measurement of this device, which other
work on it disturbs; those of the chosen schedule are then measured too.

Writes search.json and its plot search.png, prints the best schedule at each cost, and the chosen one as JSON in the
last line. `--apply` also stores it in the config.json of the model's folder, so that it is what the model then loads
with.
"""

import json
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from transformers import set_seed

from tnt_hf.command_line import clear_errors, parse_recipe_and_flags
from tnt_hf.conversion import load_classifier, load_image_processor
from tnt_hf.data import DataArguments
from tnt_hf.evaluation import (
    SearchArguments,
    apply_schedule,
    check_destinations,
    find_target,
    format_search,
    read_images,
    search_schedules,
    write_search,
)


def main() -> None:
    with clear_errors():
        arguments, data_arguments = parse_recipe_and_flags((SearchArguments, DataArguments), sys.argv[1:])
        check_destinations(arguments)
        set_seed(arguments.seed)
        model = load_classifier(
            arguments.model_name_or_path,
            revision=arguments.model_revision,
            dtype=getattr(torch, arguments.dtype),
            attn_implementation=arguments.attn_implementation,
        ).to(Accelerator(cpu=arguments.use_cpu).device)
        target = find_target(
            model, gflops=arguments.gflops, milliseconds=arguments.milliseconds, batch_size=arguments.batch_size
        )
        image_processor = load_image_processor(arguments.model_name_or_path, arguments.model_revision)
        pixel_values, labels = read_images(arguments, data_arguments, model, image_processor)

    outcome = search_schedules(
        model, pixel_values, labels, target, batch_size=arguments.batch_size, seed=arguments.seed
    )
    dataset = data_arguments.source if arguments.images_dir is None else Path(arguments.images_dir).resolve().name
    results = {"model": arguments.model_name_or_path, "dataset": dataset, **outcome}
    path = write_search(arguments.output_dir, results)
    print(f"{format_search(results)}\nwritten to {path}")
    if arguments.apply:
        print(f"stored in {apply_schedule(arguments.model_name_or_path, results['chosen'])}")
    print(json.dumps(results["chosen"]))


if __name__ == "__main__":
    main()
