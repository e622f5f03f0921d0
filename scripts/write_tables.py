"""
Write the tables of README.md from the results files they name.

    python scripts/write_tables.py            # rewrite the tables
    python scripts/write_tables.py --check    # exit with status 1 if one is out of date

A table stands between `<!-- table NAME -->` and `<!-- end of table -->`.
"""

import argparse
import json
import re
import sys
from pathlib import Path

from tnt_hf import TntDeiTConfig, TntViTConfig
from tnt_hf.schedules import PUBLISHED_SCHEDULES, count_gflops


ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
TABLE = re.compile(r"(<!-- table (\w+) -->\n).*?(<!-- end of table -->)", re.DOTALL)
MODELS = {
    "DeiT-Ti distilled": (TntDeiTConfig, 192, 3),
    "DeiT-S distilled": (TntDeiTConfig, 384, 6),
    "DeiT-B distilled": (TntDeiTConfig, 768, 12),
    "ViT-B/16": (TntViTConfig, 768, 12),
}


def markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def demo_table() -> str:
    results = json.loads((RESULTS / "demo.json").read_text())
    rows = [
        [
            row["schedule"],
            row["selection"],
            f"{row['top1']:.2f}",
            f"{row['top5']:.2f}",
            f"{row['loss']:.4f}",
            f"{row['gflops']:.4f}",
            f"{row['images_per_second']:.0f}",
        ]
        for row in results["rows"]
    ]
    versions = results["versions"]
    table = markdown(["schedule", "selection", "top-1", "top-5", "loss", "GFLOPs", "images/s"], rows)
    return (
        f"{table}\nMeasured: {results['rows'][0]['num_images']} images of {results['dataset']}, {results['device']}, "
        f"{results['num_threads']} threads, {results['dtype']}, batch {results['batch_size']}, torch "
        f"{versions['torch']}, transformers {versions['transformers']}.\n"
    )


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
    table = markdown(["model", "schedule", "top-1", "top-5", "loss", "GFLOPs"], rows)
    return f"{table}\nPublished, not measured here: [{published['source']}]({published['source']}).\n"


def gflops_table() -> str:
    rows = []
    for name, (config_class, hidden_size, num_attention_heads) in MODELS.items():
        config = config_class(
            hidden_size=hidden_size,
            num_attention_heads=num_attention_heads,
            intermediate_size=4 * hidden_size,
            num_labels=1000,
        )
        cells = [name]
        for schedule in PUBLISHED_SCHEDULES.values():
            config.set_schedule(schedule.prune_layers, schedule.keep_rates, schedule.num_similar_tokens)
            cells.append(f"{count_gflops(config):.4f}")
        rows.append(cells)
    return markdown(["GFLOPs at 224x224", *PUBLISHED_SCHEDULES], rows)


TABLES = {"demo": demo_table, "published": published_table, "gflops": gflops_table}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="Write nothing; fail if a table is out of date.")
    arguments = parser.parse_args()
    readme = ROOT / "README.md"
    before = readme.read_text()
    after = TABLE.sub(lambda match: match[1] + TABLES[match[2]]() + match[3], before)
    if arguments.check:
        sys.exit("README.md has tables that are out of date: run scripts/write_tables.py" if after != before else 0)
    readme.write_text(after)


if __name__ == "__main__":
    main()
