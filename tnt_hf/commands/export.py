r"""
Export a TNT model with its schedule to ONNX, with a dynamic batch, verified against PyTorch on ONNX Runtime.

    tnt-hf export --model_name_or_path runs/demo --output_dir runs/demo-onnx
    tnt-hf export --model_name_or_path runs/deit-small --schedule multi --int8 \
        --validation_dir /data/imagenet/val --output_dir runs/deit-small-onnx
    tnt-hf export --model_name_or_path runs/deit-small --schedule 2x --fastest_at 1 8 --output_dir runs/fastest

Writes model.onnx, the config and the image processor; with `--int8` also model_int8.onnx, and measures what that
changes on the images. With `--fastest_at` also model.pt2, compiled by AOTInductor; every form that this machine can
run is then timed in turns, and the fastest that gives PyTorch's logits is named. export.json holds the measurements,
which are also the last line printed.
"""

import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from torch.utils.data import DataLoader
from transformers import default_data_collator

from ..command_line import clear_errors, parse_flags
from ..conversion import load_for_inference, load_image_processor
from ..data import DataArguments, evaluation_images, load_images, prepare_data
from ..deployed_forms import (
    COMPILED,
    COMPILED_FILE,
    INT8_FILE,
    ONNX_FILE,
    fastest,
    format_forms,
    measure_forms,
    missing_forms,
)
from ..export import (
    ExportArguments,
    check_exportable,
    compare_sessions,
    export_compiled,
    export_onnx,
    open_session,
    quantize_int8,
)
from ..named_schedules import resolve_schedules
from ..results import device_facts
from ..schedules_tnt import count_gflops


def main() -> None:
    with clear_errors():
        arguments, data_arguments = parse_flags((ExportArguments, DataArguments), sys.argv[1:], __doc__)
        model = load_for_inference(arguments.model_name_or_path, revision=arguments.model_revision)
        image_processor = load_image_processor(arguments.model_name_or_path, arguments.model_revision)
        if arguments.schedule is not None:
            (schedule,) = resolve_schedules(model.config, [arguments.schedule])
            model.set_schedule(schedule)
        check_exportable(model)
        if arguments.int8:
            images = load_images(data_arguments, train=False, validation=True)
            split = prepare_data(images, model, image_processor, data_arguments)["validation"]

        folder = Path(arguments.output_dir)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            unfinished = Path(temporary) / folder.name
            unfinished.mkdir()
            facts = {
                "model": arguments.model_name_or_path,
                "prune_layers": model.config.prune_layers,
                "keep_rates": model.config.keep_rates,
                "num_similar_tokens": model.config.num_similar_tokens,
                "gflops": count_gflops(model.config),
                **device_facts(model.device),
                "largest_difference": export_onnx(model, unfinished / ONNX_FILE, tolerance=arguments.tolerance),
            }
            if arguments.int8:
                quantize_int8(unfinished / ONNX_FILE, unfinished / INT8_FILE)
                examples = evaluation_images(split, image_processor)
                batches = DataLoader(examples, batch_size=arguments.batch_size, collate_fn=default_data_collator)
                exact, int8 = (open_session(unfinished / name) for name in (ONNX_FILE, INT8_FILE))
                facts["int8"] = {"dataset": data_arguments.source, **compare_sessions(exact, int8, batches)}
            if arguments.fastest_at:
                facts["missing_forms"] = missing_forms()
                if COMPILED not in facts["missing_forms"]:
                    try:
                        export_compiled(model, unfinished / COMPILED_FILE, tolerance=arguments.tolerance)
                    except (RuntimeError, ValueError) as error:  # of the compiler, or other logits
                        facts["missing_forms"][COMPILED] = f"it failed: {str(error).strip().splitlines()[0]}"
                rows = measure_forms(model, unfinished, arguments.fastest_at, arguments.tolerance)
                facts["forms"] = [asdict(row) for row in rows]
                facts["fastest"] = {size: fastest(rows, size).form for size in arguments.fastest_at}
            model.config.save_pretrained(unfinished)
            image_processor.save_pretrained(unfinished)
            (unfinished / "export.json").write_text(json.dumps(facts, indent=2) + "\n")
            unfinished.rename(folder)
    if arguments.fastest_at:
        print(format_forms(rows, facts))
    print(f"written to {folder}")
    print(json.dumps(facts))
