"""
Write the tables of README.md and of the pages in docs/ from the results files they name.

    python -m benchmarks.write_tables            # rewrite the tables
    python -m benchmarks.write_tables --check    # exit with status 1 if one is out of date

A table stands between `<!-- table NAME -->` and `<!-- end of table -->`.
"""

import argparse
import json
import re
import sys
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.accuracy import METHOD_NAMES
from tnt_hf import TntDeiTConfig, TntViTConfig
from tnt_hf.named_schedules import PUBLISHED_SCHEDULES
from tnt_hf.results import markdown_table, read_results
from tnt_hf.schedules_tnt import UNPRUNED, count_gflops, count_patches


ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (
    "README.md",
    "docs/training.md",
    "docs/reproduction.md",
    "docs/speed.md",
    "docs/method.md",
    "docs/scaling.md",
    "docs/photographs.md",
    "docs/encoders.md",
)
TABLE = re.compile(r"(<!-- table (\w+) -->\n).*?(<!-- end of table -->)", re.DOTALL)
# What docs/scaling.md assumes.
NUM_GPUS = 8
UTILISATION = 0.35
PEAK_TFLOPS = {"A100": 312, "H100": 989}
IMAGENET_IMAGES = 1_281_167
IMAGENET_BYTES = 110_000
# Tables of docs/speed.md: by file of results, how tokens leave there, and at which batch sizes and schedules.
SPEED_RESULTS = {"clusters/inference.json": "clusters", "merging/inference.json": "merging"}
AVX2_SPEED_RESULTS = {"avx2/clusters/inference.json": "clusters"}
SPEED_BATCH_SIZES = (1, 8)
SPEED_SCHEDULES = ("full", "2x")
SPEED_PACKAGES = ("torch", "transformers", "timm", "onnxruntime", "openvino")
MODELS = {
    name: config_class(
        hidden_size=hidden_size,
        num_attention_heads=hidden_size // 64,
        intermediate_size=4 * hidden_size,
        num_labels=1000,
    )
    for name, config_class, hidden_size in (
        ("DeiT-Ti distilled", TntDeiTConfig, 192),
        ("DeiT-S distilled", TntDeiTConfig, 384),
        ("DeiT-B distilled", TntDeiTConfig, 768),
        ("ViT-B/16", TntViTConfig, 768),
    )
}


def demo_table() -> str:
    results = read_results(RESULTS / "demo.json")
    rows = [
        [
            row.schedule,
            row.selection,
            f"{row.top1:.2f}",
            f"{row.top5:.2f}",
            f"{row.loss:.4f}",
            f"{row.gflops:.4f}",
            f"{row.images_per_second:.0f}",
        ]
        for row in results.rows
    ]
    table = markdown_table(["schedule", "selection", "top-1", "top-5", "loss", "GFLOPs", "images/s"], rows)
    return f"{table}\n{facts_line(results.to_json(), f'{results.rows[0].num_images} images of {results.dataset}')}"


def published_table() -> str:
    published = json.loads((RESULTS / "published.json").read_text())
    rows = [
        [
            row["model"],
            row["schedule"],
            f"{row['top1']:.3f}",
            f"{row['top5']:.3f}",
            f"{row['loss']:.3f}",
            f"{row['gflops']:.2f}",
        ]
        for row in published["rows"]
    ]
    table = markdown_table(["model", "schedule", "top-1", "top-5", "loss", "GFLOPs"], rows)
    return f"{table}\nPublished, not measured here: [{published['source']}]({published['source']}).\n"


def gflops_table() -> str:
    rows = []
    for name, config in MODELS.items():
        cells = [name]
        for schedule in PUBLISHED_SCHEDULES.values():
            cells.append(f"{count_gflops(config, schedule=schedule):.4f}")
        rows.append(cells)
    return markdown_table(["GFLOPs at 224x224", *PUBLISHED_SCHEDULES], rows)


def facts_line(results: dict[str, Any], what: str, packages: tuple[str, ...] = ("torch", "transformers")) -> str:
    """What was measured, on what, and how."""
    batch = [f"batch {results['batch_size']}"] if "batch_size" in results else []
    versions = [f"{name} {results['versions'][name]}" for name in packages if name in results["versions"]]
    facts = [what, results["device"], f"{results['num_threads']} threads", results["dtype"], *batch, *versions]
    return f"Measured: {', '.join(facts)}.\n"


def speed_facts(results: dict[str, Any]) -> str:
    return facts_line(results, results["architecture"], SPEED_PACKAGES)


def inference_table(name: str) -> str:
    results = json.loads((RESULTS / name).read_text())
    image_size = results["rows"][0]["image_size"]
    forms = {}
    for row in results["rows"]:
        if row["image_size"] == image_size:
            forms.setdefault((row["runtime"], row["schedule"]), {})[row["batch_size"]] = row
    batch_sizes = list(next(iter(forms.values())))
    rows = [
        [runtime, schedule, f"{by_batch[batch_sizes[-1]]['gflops']:.2f}", *map(speed_cell, by_batch.values())]
        for (runtime, schedule), by_batch in forms.items()
    ]
    header = ["runtime", "schedule", "GFLOPs as executed", *(f"batch {batch_size}" for batch_size in batch_sizes)]
    return markdown_table(header, rows) + "\n" + speed_facts(results)


def speed_cell(row: dict[str, Any]) -> str:
    return f"{row['images_per_second']:.1f} ({row['speedup']:.2f})"


def speed_table(results_by_file: dict[str, str]) -> str:
    """Every form at half of the compute, of each reduction that was measured, beside the unreduced forms."""
    rows, facts = [], []
    for name, tokens in results_by_file.items():
        results = json.loads((RESULTS / name).read_text())
        forms = {}
        for row in results["rows"]:
            if row["schedule"] in SPEED_SCHEDULES and row["batch_size"] in SPEED_BATCH_SIZES:
                forms.setdefault((row["schedule"], row["runtime"]), []).append(row)
        for (schedule, runtime), by_batch in sorted(forms.items(), key=lambda form: -form[1][0]["gflops"]):
            is_reduced = schedule != "full"
            if is_reduced or not facts:  # the unreduced forms are those of the first file
                shown = tokens if is_reduced else "all"
                rows.append([runtime, schedule, shown, f"{by_batch[0]['gflops']:.2f}", *map(speed_cell, by_batch)])
        facts.append(facts_line(results, f"{tokens}, {results['architecture']}", SPEED_PACKAGES))
    header = ["runtime", "schedule", "tokens", "GFLOPs as executed", *(f"batch {size}" for size in SPEED_BATCH_SIZES)]
    return markdown_table(header, rows) + "\n" + "\n".join(facts)


def kept_table(name: str, runtimes: tuple[str, ...]) -> str:
    results = json.loads((RESULTS / name).read_text())
    rows = [
        [
            row["runtime"],
            row["schedule"],
            str(row["batch_size"]),
            f"{row['gflops']:.2f}",
            f"{row['flops_reduction']:.2f}",
            f"{row['speedup']:.2f}",
            f"{row['speedup_kept']:.2f}",
            f"{row['share_of_matmul_rate']:.2f}",
        ]
        for row in results["rows"]
        if row["image_size"] == results["rows"][0]["image_size"] and row["runtime"] in runtimes
    ]
    header = ["runtime", "schedule", "batch", "GFLOPs as executed", "fewer FLOPs", "speed-up", "kept"]
    return markdown_table([*header, "share of the matrix-multiply rate"], rows) + "\n" + speed_facts(results)


def resolutions_table() -> str:
    results = json.loads((RESULTS / "resolutions" / "inference.json").read_text())
    batch_size = min(row["batch_size"] for row in results["rows"])
    speedups = {}
    for row in results["rows"]:
        if row["runtime"] == "eager" and row["batch_size"] == batch_size:
            speedups.setdefault(row["image_size"], {})[row["schedule"]] = row["speedup"]
    rows = []
    for image_size, measured in speedups.items():
        ratios = [f"{measured[name] / measured['full']:.2f}" for name in measured]
        rows.append([f"{image_size}x{image_size}", str(count_patches(image_size, 16)), *ratios])
    header = ["images", "patch tokens", *(f"{name} / full" for name in next(iter(speedups.values())))]
    table = markdown_table(header, rows)
    return f"{table}\nSpeed-up of the eager model at batch {batch_size} over its own `full`. {speed_facts(results)}"


def profile_table() -> str:
    results = json.loads((RESULTS / "profile.json").read_text())
    names = sorted({name for row in results["rows"] for name in row["operations"]})
    names.sort(key=lambda name: -sum(row["operations"].get(name, 0) for row in results["rows"]))
    names = names[:6]
    rows = [
        [
            f"{row['runtime']}, {row['schedule']}",
            str(row["batch_size"]),
            *(f"{100 * row['operations'].get(name, 0):.1f}" for name in names),
            f"{100 * row['selection_share']:.2f}",
            f"{row['linear_gflops_per_second'] / row['matmul_gflops_per_second']:.2f}",
        ]
        for row in results["rows"]
    ]
    header = ["form", "batch", *(f"`{name}` %" for name in names), "selection %", "linear layers / large product"]
    return markdown_table(header, rows) + "\n" + speed_facts(results)


def accuracy_table(name: str) -> str:
    results = json.loads((RESULTS / name).read_text())
    methods = {}
    for row in results["rows"]:
        methods.setdefault(row["method"], {})[row["budget"]] = row
    unpruned = methods.pop("unpruned")[1.0]
    budgets = list(next(iter(methods.values())))
    rows = [
        [METHOD_NAMES.get(method, method), *(top1_cell(by_budget[budget]) for budget in budgets)]
        for method, by_budget in methods.items()
    ]
    table = markdown_table(["top-1 at a share of the GFLOPs", *(f"{100 * budget:.0f} %" for budget in budgets)], rows)
    return (
        f"{table}\nUnpruned: {unpruned['top1']:.2f} at {results['gflops_unpruned']:.4f} GFLOPs. Mean over the seeds "
        f"{', '.join(map(str, results['seeds']))} with its standard error where there is randomness; heads trained on "
        f"{results['num_train_images']} images. {accuracy_facts(results)}"
    )


def top1_cell(row: dict[str, Any]) -> str:
    is_random = len(row["top1_by_seed"]) > 1
    return f"{row['top1']:.2f} ± {row['standard_error']:.2f}" if is_random else f"{row['top1']:.2f}"


def accuracy_facts(results: dict[str, Any]) -> str:
    return facts_line(results, f"{results['num_images']} test images, {results['model']}")


def rankings_table() -> str:
    results = json.loads((RESULTS / "cluttered" / "accuracy.json").read_text())
    shares = {}
    for row in results["rankings"]:
        shares.setdefault(row["method"], {})[row["layer"]] = row["object_share"]
    layers = sorted(set.intersection(*(set(by_layer) for by_layer in shares.values())))
    rows = [[method, *(f"{by_layer[layer]:.2f}" for layer in layers)] for method, by_layer in shares.items()]
    table = markdown_table(["scoring heads", *(f"layer {layer}" for layer in layers)], rows)
    return f"{table}\n{accuracy_facts(results)}"


def training_table() -> str:
    results = json.loads((RESULTS / "training.json").read_text())
    rows = [
        [
            row["step"],
            f"{row['num_trained_parameters']:,}",
            f"{row['seconds']:.2f}",
            f"{row['time_ratio']:.2f}",
            f"{row['peak_memory_mb']:.0f}",
            f"{row['memory_ratio']:.2f}",
            f"{row['images_per_second']:.1f}",
        ]
        for row in results["rows"]
    ]
    header = ["step", "parameters that learn", "seconds", "/ fine-tuning", "peak MB", "/ fine-tuning", "images/s"]
    return f"{markdown_table(header, rows)}\n{facts_line(results, results['architecture'])}"


def input_table() -> str:
    results = json.loads((RESULTS / "training.json").read_text())
    rows = [[row["augmentation"], f"{row['images_per_second']:.0f}"] for row in results["input_rows"]]
    table = markdown_table(["augmentation", "images/s"], rows)
    return f"{table}\n{results['num_workers']} workers. {facts_line(results, results['architecture'])}"


def scaling_table() -> str:
    inputs = json.loads((RESULTS / "training.json").read_text())["input_rows"]
    rows = []
    for name, config in MODELS.items():
        forward = count_gflops(config, schedule=UNPRUNED, as_executed=True)
        backward = forward * (1 - 1 / config.num_hidden_layers)  # activations alone, and none before the first head
        cells = [name, f"{forward:.1f}"]
        for step, num_epochs, row in ((forward + backward, 40, inputs[1]), (2 * forward + backward, 1, inputs[0])):
            rates = [NUM_GPUS * UTILISATION * peak * 1e3 / (2 * step) for peak in PEAK_TFLOPS.values()]
            minutes = [num_epochs * IMAGENET_IMAGES / rate / 60 for rate in rates]
            cells += [f"{step:.1f}", " / ".join(f"{value:.1f}" for value in minutes)]
            cells.append(" / ".join(f"{rate / row['images_per_second']:.0f}" for rate in rates))
        cells.append(" / ".join(f"{rate * IMAGENET_BYTES / 1e9:.1f}" for rate in rates))
        rows.append(cells)
    gpus = " / ".join(PEAK_TFLOPS)
    header = ["model", "forward GFLOPs, executed", "GFLOPs of a step with labels", f"40 epochs, minutes on {gpus}"]
    header += ["cores to feed it", "GFLOPs of a step with self-distillation", "1 epoch, minutes", "cores to feed it"]
    header += ["GB/s read"]
    return markdown_table(header, rows)


def adaptation_table() -> str:
    results = json.loads((RESULTS / "adaptation" / "results.json").read_text())
    rows = [
        [
            row["network"],
            row["schedule"],
            f"{row['share']:.3f}",
            f"{row['top1']:.1f}",
            f"{row['top1_drop']:+.1f}",
            f"{row['kl']:.3f} ± {row['kl_standard_error']:.3f}",
            f"{row['kl_over_original']:+.3f} ± {row['kl_over_original_standard_error']:.3f}",
        ]
        for row in results["rows"]
    ]
    header = ["network", "schedule", "share of the compute", "top-1", "drop", "KL", "KL over the original"]
    return markdown_table(header, rows) + f"\n{_measured_on(results)}\n"


ADAPTATIONS = {
    "budgets": "adapted over budgets",
    "full": "adapted to full alone",
    "clothing": "adapted over budgets, on pictures of clothing",
}


def adaptation_controls_table() -> str:
    """What adapts an adapted network: budgets, or images, or images of the same domain."""
    runs = {
        name: json.loads((RESULTS / "adaptation" / folder / "results.json").read_text())
        for folder, name in ADAPTATIONS.items()
    }
    cells = {
        ("original" if row["network"] == "original" else name, row["schedule"]): f"{row['top1']:.1f}, {row['kl']:.3f}"
        for name, run in runs.items()
        for row in run["rows"]
    }
    first = next(iter(runs.values()))
    schedules = {row["schedule"]: f"{row['schedule']} ({row['share']:.2f})" for row in first["rows"]}
    rows = [[name, *(cells[name, schedule] for schedule in schedules)] for name in ("original", *runs)]
    return markdown_table(["network: top-1, KL", *schedules.values()], rows) + f"\n{_measured_on(first)}\n"


SMALL_BACKBONES = ("cluttered", "plain")


def adaptation_small_table() -> str:
    """What the same adaptation gains on networks that know a single resolution."""
    rows, measured = [], []
    for name in SMALL_BACKBONES:
        results = json.loads((RESULTS / "adaptation" / name / "results.json").read_text())
        schedules = {row["schedule"]: f"{row['schedule']} ({row['share']:.2f})" for row in results["rows"]}
        cells = {
            (row["network"], row["schedule"]): f"{row['top1']:.1f}, {row['kl']:.3f} ± {row['kl_standard_error']:.3f}"
            for row in results["rows"]
        }
        for network in ("original", "adapted"):
            rows.append([name, network, *(cells[network, schedule] for schedule in schedules)])
        measured.append(_measured_on(results))
    return (
        markdown_table(["images", "network: top-1, KL", *schedules.values()], rows) + "\n" + "\n".join([*measured, ""])
    )


def heads_table() -> str:
    """What trained scoring heads are worth beside a random ranking, for tokens that are merged and dropped."""
    rows = []
    for reduction in ("drop", "merge"):
        results = json.loads((RESULTS / "heads" / f"{reduction}.json").read_text())
        by_schedule = {}
        for row in results["rows"]:
            by_schedule.setdefault(row["schedule"], {})[row["selection"]] = f"{row['top1']:.1f}, {row['loss']:.2f}"
        rows += [
            [reduction, schedule, each["relevance"], each["random"]]
            for schedule, each in by_schedule.items()
            if "random" in each
        ]
    training = results["training"]
    return markdown_table(["tokens", "schedule", "ranked by heads: top-1, loss", "ranked at random"], rows) + (
        f"\nHeads trained on {training['num_steps']} steps of {training['images_per_step']} images, noise_std "
        f"{training['noise_std']:g}, gate {training['noise_gate']}, to a loss of {training['loss']:.2f}. "
        f"{_measured_on(results | {'num_images': results['rows'][0]['num_images']})}\n"
    )


ENCODER_COLUMNS = ["embeddings: cosine", "its median, 5th percentile", "recall@1, drop", "recall@5, drop"]
ENCODER_COLUMNS += ["same neighbours", "patches: cosine", "maps: error", "correlation"]


def encoders_table() -> str:
    """What reduced embeddings, patch features and maps are beside those of the encoder unreduced."""
    results = json.loads((RESULTS / "encoders" / "results.json").read_text())
    rows = [
        [row["schedule"], f"{row['share']:.3f}", f"{row['speedup']:.2f}", *_encoder_cells(row)]
        for row in results["rows"][1:]
    ]
    header = ["schedule", "share of the compute", "speed-up", *ENCODER_COLUMNS]
    return markdown_table(header, rows) + f"\n{_encoder_facts(results)}\n"


def adapted_encoder_table() -> str:
    """The encoder as it was and adapted, both beside the original unreduced."""
    results = json.loads((RESULTS / "encoders" / "adapted" / "results.json").read_text())
    rows = [
        [row["network"], row["schedule"], f"{row['share']:.3f}", *_encoder_cells(row)] for row in results["rows"][1:]
    ]
    training = results["training"]
    return markdown_table(["network", "schedule", "share of the compute", *ENCODER_COLUMNS], rows) + (
        f"\nAdapted: {training['num_trained_parameters']:,} numbers, {training['num_steps']} steps of "
        f"{training['images_per_step']} of {training['num_images']:,} unlabelled images, schedules "
        f"{', '.join(training['schedules'])}. {_encoder_facts(results)}\n"
    )


def _encoder_cells(row: dict[str, Any]) -> list[str]:
    return [
        f"{row['embedding_cosine']:.4f} ± {row['embedding_cosine_standard_error']:.4f}",
        f"{row['embedding_cosine_median']:.4f}, {row['embedding_cosine_5th_percentile']:.4f}",
        _recall_and_drop(row, 1),
        _recall_and_drop(row, 5),
        f"{row['neighbour_overlap']:.1f} ± {row['neighbour_overlap_standard_error']:.1f}",
        f"{row['patch_cosine']:.4f} ± {row['patch_cosine_standard_error']:.4f}",
        f"{row['saliency_error']:.4f} ± {row['saliency_error_standard_error']:.4f}",
        f"{row['saliency_correlation']:.4f} ± {row['saliency_correlation_standard_error']:.4f}",
    ]


def _encoder_facts(results: dict[str, Any]) -> str:
    unreduced = results["rows"][0]
    return (
        f"Unreduced: {unreduced['recall_at_1']:.1f} recall@1, {unreduced['recall_at_5']:.1f} recall@5, "
        f"{results['layer_gflops_unreduced']:.3g} GFLOPs in the layers, maps of standard deviation "
        f"{unreduced['saliency_deviation']:.3f}. {_measured_on(results)}"
    )


def _recall_and_drop(row: dict[str, Any], count: int) -> str:
    drop, error = (row[f"recall_at_{count}_drop{ending}"] for ending in ("", "_standard_error"))
    return f"{row[f'recall_at_{count}']:.1f}, {drop:+.1f} ± {error:.1f}"


REAL_METHODS = {
    "clusters": "**clusters**",
    "clusters+smaller_images": "**clusters, image size chosen**",
    "smaller_images": "smaller images alone",
    "token_merging": "Token Merging",
    "token_merging+smaller_images": "Token Merging, image size chosen",
    "pitome": "PiToMe",
    "multi_criteria": "MCTF",
    "sort_prune_merge": "DiffRate-style (sort, prune, merge)",
    "mlp_shift": "Representation Shift",
    "cls_attention": "[CLS] attention (EViT)",
    "random": "random",
}


SUMMARY_METHODS = (
    "clusters+smaller_images",
    "clusters",
    "token_merging+smaller_images",
    "token_merging",
    "smaller_images",
)
SUMMARY_BUDGETS = (0.7, 0.5, 0.35)


def real_table(folder: str) -> str:
    """Top-1 and divergence of each method at each budget, on a network and images that a results file names."""
    results = json.loads((RESULTS / folder / "results.json").read_text())
    unreduced, *rows = results["rows"]
    cells = {(row["method"], row["budget"]): row for row in rows}
    budgets = sorted({row["budget"] for row in rows}, reverse=True)
    lines = [
        [name, *(_top1_and_divergence(cells.get((method, budget))) for budget in budgets)]
        for method, name in REAL_METHODS.items()
        if any(row["method"] == method for row in rows)
    ]
    header = ["top-1, KL at a share of the compute", *(f"{100 * budget:.0f} %" for budget in budgets)]
    return markdown_table(header, lines) + (
        f"\nUnreduced: {unreduced['top1']:.1f} at {results['gmacs_unreduced']:.3g} GFLOPs. What a method leaves open "
        f"was chosen on {results['num_unlabelled']} other images without labels. {_measured_on(results)}\n"
    )


def paired_table() -> str:
    """How much further from the unreduced network the rivals that choose an image size are, on the same images."""
    results = json.loads((RESULTS / "real" / "paired" / "results.json").read_text())
    rows = [row for row in results["rows"][1:] if row["method"] != results["reference"]]
    cells = {
        (row["method"], row["budget"]): (
            f"{row['kl_over_reference']:+.3f} ± {row['kl_over_reference_standard_error']:.3f}"
        )
        for row in rows
    }
    budgets = sorted({row["budget"] for row in rows}, reverse=True)
    methods = dict.fromkeys(row["method"] for row in rows)
    lines = [[REAL_METHODS[method], *(cells[method, budget] for budget in budgets)] for method in methods]
    header = ["KL over that of the reference", *(f"{100 * budget:.0f} %" for budget in budgets)]
    reference = REAL_METHODS[results["reference"]].strip("*")
    return markdown_table(header, lines) + f"\nReference: {reference}. {_measured_on(results)}\n"


def summary_table() -> str:
    """Top-1 and speed-up of clusters and of what one would take without them, on the network of real size."""
    results = json.loads((RESULTS / "real" / "results.json").read_text())
    unreduced, *rows = results["rows"]
    cells = {(row["method"], row["budget"]): f"{row['top1']:.1f}, {row['speedup']:.2f}" for row in rows}
    lines = [
        [REAL_METHODS[method], *(cells[method, budget] for budget in SUMMARY_BUDGETS)] for method in SUMMARY_METHODS
    ]
    header = ["top-1, speed-up at a share of the compute", *(f"{100 * budget:.0f} %" for budget in SUMMARY_BUDGETS)]
    return markdown_table(header, lines) + f"\nUnreduced: {unreduced['top1']:.1f}. {_measured_on(results)}\n"


def _top1_and_divergence(row: dict[str, Any] | None) -> str:
    return "-" if row is None else f"{row['top1']:.1f}, {row['kl']:.3f} ± {row['kl_standard_error']:.3f}"


def real_speed_table() -> str:
    """What the bench measured of clusters beside what the products promise."""
    results = json.loads((RESULTS / "real" / "results.json").read_text())
    rows = [
        [
            f"{100 * row['share']:.1f} %",
            f"{row['speedup']:.2f}",
            f"{1 / row['share']:.2f}",
            f"{row['speedup'] * row['share']:.2f}",
        ]
        for row in results["rows"]
        if row["method"] == "clusters"
    ]
    return markdown_table(["share of the compute", "speed-up", "its inverse", "ratio"], rows) + (
        f"\n{_measured_on(results)}\n"
    )


def _measured_on(results: dict[str, Any]) -> str:
    versions = results["versions"]
    return (
        f"Measured: {results['num_images']} validation images of {results['dataset']}, {results['model']}, "
        f"{results['device']}, {results['num_threads']} threads, {results['dtype']}, batch {results['batch_size']}, "
        f"torch {versions['torch']}, transformers {versions['transformers']}."
    )


TABLES = {
    "summary": summary_table,
    "real": partial(real_table, "real"),
    "real_paired": paired_table,
    "real_cluttered": partial(real_table, "real/cluttered"),
    "real_plain": partial(real_table, "real/plain"),
    "real_speed": real_speed_table,
    "adaptation": adaptation_table,
    "adaptation_controls": adaptation_controls_table,
    "adaptation_small": adaptation_small_table,
    "heads": heads_table,
    "encoders": encoders_table,
    "adapted_encoder": adapted_encoder_table,
    "training": training_table,
    "input": input_table,
    "scaling": scaling_table,
    "accuracy": partial(accuracy_table, "accuracy.json"),
    "cluttered": partial(accuracy_table, "cluttered/accuracy.json"),
    "ablation": partial(accuracy_table, "ablation/accuracy.json"),
    "rankings": rankings_table,
    "merging_speed": partial(kept_table, "merging/inference.json", ("eager", "ONNX Runtime")),
    "demo": demo_table,
    "published": published_table,
    "gflops": gflops_table,
    "inference": partial(inference_table, "inference.json"),
    "speed": partial(speed_table, SPEED_RESULTS),
    "speed_avx2": partial(speed_table, AVX2_SPEED_RESULTS),
    "kept": partial(kept_table, "inference.json", ("eager",)),
    "limit": partial(kept_table, "avx2/clusters/inference.json", ("eager", "ONNX Runtime", "OpenVINO")),
    "resolutions": resolutions_table,
    "profile": profile_table,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="Write nothing; fail if a table is out of date.")
    arguments = parser.parse_args()
    for page in PAGES:
        before = (ROOT / page).read_text()
        after = TABLE.sub(lambda match: match[1] + TABLES[match[2]]() + match[3], before)
        if after == before:
            continue
        if arguments.check:
            sys.exit(f"{page} has tables that are out of date: run python -m benchmarks.write_tables")
        (ROOT / page).write_text(after)


if __name__ == "__main__":
    main()
