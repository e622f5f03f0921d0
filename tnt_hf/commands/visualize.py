r"""
Draw what a model keeps of images under some schedules, and plot the accuracy of a results file.

    tnt-hf visualize --model_name_or_path runs/demo --output_dir runs/pictures
    tnt-hf visualize --model_name_or_path runs/deit-small --images /data/photos --max_images 6 \
        --schedules single multi 1.5x --output_dir runs/photos
    tnt-hf visualize --results runs/demo/results.json --output_dir runs/plot

Writes kept_tokens_SCHEDULE.png for each schedule that prunes: the relevance of the patches, what is left of them after
pruned layers, and the answer before and after; schedules.png with all schedules side by side, with `--overview` also
overview.png, the method on one of the images, and with `--results` accuracy.png. Without images, the bundled ones are
drawn. The last line is JSON: the pictures written.
"""

import json
import sys
from functools import partial
from pathlib import Path

from ..command_line import clear_errors, parse_flags
from ..conversion import load_for_inference, load_image_processor
from ..data import DataArguments, check_input_size
from ..results import check_no_results, read_results
from ..schedules_tnt import height_and_width
from ..visualization import (
    PictureArguments,
    draw_kept_tokens,
    draw_overview,
    draw_schedules,
    plot_accuracy,
    read_images,
    schedules_to_draw,
    sheet_name,
)


def main() -> None:
    with clear_errors():
        arguments, data_arguments = parse_flags((PictureArguments, DataArguments), sys.argv[1:], __doc__)
        pictures = {}  # by file name, what draws it
        if arguments.results is not None:
            results = read_results(arguments.results)
            pictures["accuracy.png"] = partial(plot_accuracy, results.rows, results.dataset)
        if arguments.model_name_or_path is not None:
            model = load_for_inference(arguments.model_name_or_path, revision=arguments.model_revision)
            image_processor = load_image_processor(arguments.model_name_or_path, arguments.model_revision)
            check_input_size(image_processor, height_and_width(model.config.image_size), model.config.num_channels)
            images = read_images(arguments, data_arguments)
            schedules = schedules_to_draw(model.config, arguments.schedules)
            for schedule in schedules:
                if schedule.prune_layers:
                    pictures[sheet_name(schedule)] = partial(
                        draw_kept_tokens,
                        model,
                        image_processor,
                        images,
                        schedule=schedule,
                        max_layers=arguments.max_layers,
                    )
            if len(schedules) > 1:
                pictures["schedules.png"] = partial(
                    draw_schedules,
                    model,
                    image_processor,
                    images,
                    schedules,
                    show_answers=arguments.show_answers,
                )
            if arguments.overview is not None:
                image = images[arguments.overview]
                pictures["overview.png"] = partial(draw_overview, model, image_processor, image, schedules)
        for name in pictures:
            check_no_results(arguments.output_dir, arguments.overwrite_output_dir, name)
        folder = Path(arguments.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        for name, draw in pictures.items():
            draw(folder / name)
            print(f"written to {folder / name}")
    print(json.dumps({"pictures": list(pictures)}))
