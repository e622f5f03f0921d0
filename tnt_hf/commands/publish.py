"""
Publish a finished run on the Hub: stage a clean folder, verify it, upload it in one commit.

    tnt-hf publish runs/demo --repo_id org/name --dry_run
    tnt-hf publish runs/demo --repo_id org/name --private
    tnt-hf publish runs/deit-small --repo_id org/name --create_pr --card_images_dir photos

A failed check uploads nothing, and an interrupted push is completed by the same command. `--dry_run` needs neither
login nor network: it prints the card and the files. The last line is the outcome as JSON.
"""

import argparse
import json
from pathlib import Path

from ..command_line import FlagParser, clear_errors
from ..publishing import (
    CardArguments,
    Destination,
    connect,
    describe_staged,
    describe_upload,
    upload,
    verified_stage,
)


def parse_arguments() -> tuple[CardArguments, argparse.Namespace]:
    parser = FlagParser(CardArguments, __doc__)
    parser.add_argument(
        "run_dir",
        type=Path,
        help="Output folder of `tnt-hf train`, or a folder of a model with the results of `tnt-hf evaluate`.",
    )
    parser.add_argument(
        "--repo_id", required=True, help="Repo org/name on the Hub; it is created if it does not exist."
    )
    parser.add_argument("--private", action="store_true", help="Create a private repo; refuse a repo that is public.")
    parser.add_argument("--revision", default="main", help="Branch to commit to; it is created if it does not exist.")
    parser.add_argument("--create_pr", action="store_true", help="Open a pull request instead of committing.")
    parser.add_argument("--dry_run", action="store_true", help="Stage and verify the files, but upload nothing.")
    return parser.parse_args_into_dataclasses()


def main() -> None:
    with clear_errors():
        card_arguments, arguments = parse_arguments()
        destination = Destination(arguments.repo_id, arguments.private, arguments.revision, arguments.create_pr)
        api = None if arguments.dry_run else connect(destination)
        with verified_stage(arguments.run_dir, arguments.repo_id, card_arguments) as staged:
            if arguments.dry_run:
                print(f"{staged.card}\n{describe_staged(staged, destination)}\nDry run: nothing was uploaded.")
                outcome = {"repo_id": arguments.repo_id, "tag": staged.tag, "files": list(staged.files)}
            else:
                print(describe_staged(staged, destination), flush=True)
                outcome = upload(api, staged, destination)
                print(describe_upload(outcome))
    print(json.dumps(outcome))
