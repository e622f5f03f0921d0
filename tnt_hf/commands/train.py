r"""
Train the scoring heads of a frozen ViT, distilled DeiT or DINOv2, or adapt its LayerNorms and biases, and evaluate it.

    tnt-hf train merge --output_dir runs/demo
    tnt-hf train adapt --output_dir runs/adapted
    accelerate launch -m tnt_hf train merge --model_name_or_path facebook/deit-small-distilled-patch16-224 \
        --train_dir /data/imagenet/train --validation_dir /data/imagenet/val --output_dir runs/deit-small

A recipe may come first, by its name or as the path of a YAML or JSON file; flags override it. `--train_backbone`
trains all weights. The output folder holds the model with its code and image processor, and results.json with one row
for each schedule. `--push_to_hub --hub_model_id org/name` publishes the finished run as `tnt-hf publish` does, with
the same last line.
"""

import json
import sys
from pathlib import Path

from ..command_line import clear_errors, parse_recipe_and_flags
from ..data import BadData, DataArguments
from ..evaluation import EvaluationArguments, describe_run
from ..publishing import (
    CardArguments,
    connect,
    describe_staged,
    describe_upload,
    training_destination,
    upload,
    verified_stage,
)
from ..results import TRAINING_NAME, format_table, recorded_training, write_json, write_results
from ..training import (
    ModelArguments,
    Recipe,
    TntTrainingArguments,
    TrainingStopped,
    checkpoint_to_resume,
    classify_first_image,
    describe_training,
    record_run,
)


ARGUMENT_TYPES = (ModelArguments, DataArguments, EvaluationArguments, CardArguments, TntTrainingArguments)


def main() -> None:
    with clear_errors():
        model_arguments, data_arguments, evaluation_arguments, card_arguments, arguments = parse_recipe_and_flags(
            ARGUMENT_TYPES, sys.argv[1:], __doc__
        )
        checkpoint = checkpoint_to_resume(arguments)
        destination = training_destination(arguments)
        api = None if destination is None else connect(destination, arguments.hub_token)
        trainer = Recipe(model_arguments, data_arguments, evaluation_arguments, arguments).make_trainer()
        if arguments.do_train:
            record_run(checkpoint, model_arguments, data_arguments, arguments)
            if checkpoint is not None and arguments.process_index == 0:
                print(f"continuing from {checkpoint}")

    if arguments.do_train:
        model_dir = arguments.output_dir
        with clear_errors((BadData, TrainingStopped)):
            outcome = trainer.train(resume_from_checkpoint=checkpoint)
        trainer.log_metrics("train", outcome.metrics)
        trainer.save_metrics("train", outcome.metrics)
        trainer.save_model()
        trainer.save_state()
        training = describe_training(trainer, outcome, model_arguments, data_arguments)
        if trainer.is_world_process_zero():
            write_json(Path(model_dir) / TRAINING_NAME, training)
    else:
        model_dir = model_arguments.model_name_or_path
        training = recorded_training(model_dir)

    if arguments.do_eval:
        with clear_errors((BadData,)):
            rows = trainer.evaluate_schedules()
        if trainer.is_world_process_zero():
            split = trainer.images["validation"]
            results = describe_run(
                rows,
                trainer.model,
                name=model_dir,
                data_arguments=data_arguments,
                split=split,
                training=training,
                batch_size=arguments.per_device_eval_batch_size,
                accelerator=trainer.accelerator,
                seed=arguments.seed,
                candidates=trainer.candidates,
            )
            path = write_results(arguments.output_dir, results)
            if arguments.do_train:
                (Path(model_dir) / TRAINING_NAME).unlink()
                print(classify_first_image(arguments.output_dir, split))
            print(f"{format_table(results)}\nwritten to {path}", flush=True)
            if destination is not None:
                with clear_errors(), verified_stage(model_dir, destination.repo_id, card_arguments) as staged:
                    print(describe_staged(staged, destination), flush=True)
                    published = upload(api, staged, destination)
                print(f"{describe_upload(published)}\n{json.dumps(published)}")
