"""
Train the scoring heads of a TNT model on a frozen ViT or distilled DeiT, and evaluate it under several budgets.

    python scripts/run_image_classification.py examples/recipes/merge.yaml --output_dir runs/demo
    accelerate launch scripts/run_image_classification.py examples/recipes/merge.yaml \
        --model_name_or_path facebook/deit-small-distilled-patch16-224 \
        --train_dir /data/imagenet/train --validation_dir /data/imagenet/val --output_dir runs/deit-small

A recipe in YAML or JSON may come first; flags override it. `--train_backbone` trains all weights, `--plain_vit` trains
and evaluates the plain Transformers model. The output folder holds the model with its code and image processor, and
results.json with one row for each schedule. `--push_to_hub --hub_model_id org/name` publishes the finished run as
scripts/push_to_hub.py does, with the same last line.
"""

import json
import sys

from transformers import set_seed

from tnt_hf.command_line import clear_errors, parse_recipe_and_flags
from tnt_hf.conversion import load_image_processor
from tnt_hf.data import BadData, DataArguments, load_images, prepare_data, present_classes
from tnt_hf.evaluation import EvaluationArguments, describe_run, evaluate_schedules
from tnt_hf.named_schedules import resolve_schedules
from tnt_hf.publishing import (
    CardArguments,
    connect,
    describe_staged,
    describe_upload,
    training_destination,
    upload,
    verified_stage,
)
from tnt_hf.results import format_table, recorded_training, write_results
from tnt_hf.schedules_tnt import UNPRUNED
from tnt_hf.training import (
    ModelArguments,
    TntTrainingArguments,
    TrainingStopped,
    checkpoint_to_resume,
    classify_first_image,
    describe_training,
    load_model,
    make_trainer,
    record_run,
    save_trained,
)


def main() -> None:
    with clear_errors():
        model_arguments, data_arguments, evaluation_arguments, card_arguments, training_arguments = (
            parse_recipe_and_flags(
                (ModelArguments, DataArguments, EvaluationArguments, CardArguments, TntTrainingArguments), sys.argv[1:]
            )
        )
        checkpoint = checkpoint_to_resume(training_arguments)
        destination = training_destination(training_arguments, model_arguments)
        api = None if destination is None else connect(destination, training_arguments.hub_token)
        set_seed(training_arguments.seed)
        images = load_images(
            data_arguments,
            train=training_arguments.do_train,
            validation=training_arguments.do_eval,
            train_labels=not training_arguments.self_distillation,
            may_stream=True,
        )
        model = load_model(
            model_arguments, images, training_arguments, trust_label_order=data_arguments.trust_label_order
        )
        image_processor = load_image_processor(model_arguments.model_name_or_path, model_arguments.model_revision)
        dataset = prepare_data(images, model, image_processor, data_arguments)
        schedules = [UNPRUNED] if model_arguments.plain_vit else evaluation_arguments.schedules
        schedules = resolve_schedules(model.config, schedules)
        candidates = None
        if evaluation_arguments.candidate_classes == "present" and training_arguments.do_eval:
            candidates = present_classes(images["validation"], model.config.id2label, data_arguments.trust_label_order)
        trainer = make_trainer(model, dataset, image_processor, training_arguments, data_arguments)

        if training_arguments.do_train:
            record_run(checkpoint, model_arguments, data_arguments, training_arguments)
            if checkpoint is not None and training_arguments.process_index == 0:
                print(f"continuing from {checkpoint}")

    if training_arguments.do_train:
        with clear_errors((BadData, TrainingStopped)):
            outcome = trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        trainer.log_metrics("train", outcome.metrics)
        trainer.save_metrics("train", outcome.metrics)
        save_trained(trainer, plain=model_arguments.plain_vit)
        training = describe_training(trainer, outcome, model_arguments, data_arguments)
    else:
        training = recorded_training(model_arguments.model_name_or_path)

    if training_arguments.do_eval:
        with clear_errors((BadData,)):
            rows = evaluate_schedules(
                model,
                trainer.get_eval_dataloader(),
                schedules,
                random_control=evaluation_arguments.random_control,
                seed=training_arguments.seed,
                accelerator=trainer.accelerator,
                candidates=candidates,
            )
        model_dir = (
            training_arguments.output_dir if training_arguments.do_train else model_arguments.model_name_or_path
        )
        if trainer.is_world_process_zero():
            results = describe_run(
                rows,
                model,
                name=model_dir,
                data_arguments=data_arguments,
                split=dataset["validation"],
                training=training,
                batch_size=training_arguments.per_device_eval_batch_size,
                accelerator=trainer.accelerator,
                seed=training_arguments.seed,
                candidates=candidates,
            )
            path = write_results(training_arguments.output_dir, results)
            if training_arguments.do_train:
                print(classify_first_image(training_arguments.output_dir, dataset["validation"]))
            print(f"{format_table(results)}\nwritten to {path}", flush=True)
            if destination is not None:
                with clear_errors(), verified_stage(model_dir, destination.repo_id, card_arguments) as staged:
                    print(describe_staged(staged, destination), flush=True)
                    published = upload(api, staged, destination)
                print(f"{describe_upload(published)}\n{json.dumps(published)}")


if __name__ == "__main__":
    main()
