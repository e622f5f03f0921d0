r"""
Evaluate a model under several schedules, with random selection as a control.

    tnt-hf evaluate --model_name_or_path runs/demo
    accelerate launch -m tnt_hf evaluate --model_name_or_path runs/deit-small \
        --validation_dir /data/imagenet/val --schedules full single multi 2,3:0.7,0.7:30 --batch_size 128

Prints top-1, top-5, loss, GFLOPs and images per second; with `--output_dir`, also writes them to results.json.
"""

import sys

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import default_data_collator

from ..command_line import clear_errors, parse_flags
from ..conversion import load_for_inference, load_image_processor
from ..data import (
    BadData,
    DataArguments,
    evaluation_images,
    load_images,
    num_evaluation_workers,
    prepare_data,
    present_classes,
)
from ..evaluation import EvaluationArguments, SavedModelArguments, describe_run, evaluate_schedules
from ..named_schedules import resolve_schedules
from ..results import check_no_results, format_table, recorded_training, write_results


def main() -> None:
    with clear_errors():
        arguments, data_arguments, evaluation_arguments = parse_flags(
            (SavedModelArguments, DataArguments, EvaluationArguments), sys.argv[1:], __doc__
        )
        check_no_results(arguments.output_dir, arguments.overwrite_output_dir)
        images = load_images(data_arguments, train=False, validation=True, may_stream=True)
        model = load_for_inference(
            arguments.model_name_or_path,
            revision=arguments.model_revision,
            dtype=getattr(torch, arguments.dtype),
            attn_implementation=arguments.attn_implementation,
        )
        image_processor = load_image_processor(arguments.model_name_or_path, arguments.model_revision)
        split = prepare_data(images, model, image_processor, data_arguments)["validation"]
        schedules = resolve_schedules(model.config, evaluation_arguments.schedules)
        candidates = None
        if evaluation_arguments.candidate_classes == "present":
            candidates = present_classes(images["validation"], model.config.id2label, data_arguments.trust_label_order)

    accelerator = Accelerator(cpu=arguments.use_cpu)
    examples = evaluation_images(split, image_processor)
    batches = DataLoader(
        examples,
        batch_size=arguments.batch_size,
        num_workers=num_evaluation_workers(examples, arguments.num_workers, accelerator.num_processes),
        collate_fn=default_data_collator,
    )
    model.to(accelerator.device)
    with clear_errors((BadData,)):
        rows = evaluate_schedules(
            model,
            accelerator.prepare(batches),
            schedules,
            random_control=evaluation_arguments.random_control,
            seed=arguments.seed,
            accelerator=accelerator,
            candidates=candidates,
        )
    if accelerator.is_main_process:
        results = describe_run(
            rows,
            model,
            name=arguments.model_name_or_path,
            data_arguments=data_arguments,
            split=split,
            training=recorded_training(arguments.model_name_or_path),
            batch_size=arguments.batch_size,
            accelerator=accelerator,
            seed=arguments.seed,
            candidates=candidates,
        )
        if arguments.output_dir is not None:
            print(f"written to {write_results(arguments.output_dir, results)}")
        print(format_table(results))
