"""A finished run on its way to the Hub: card, clean folder, proof, upload; needs `[train]`."""

from .card import KEPT_TOKENS_PICTURE, eval_results_files, make_card
from .hub_code import CODE_FILES
from .hub_upload import Destination, connect, describe_staged, describe_upload, training_destination, upload
from .staging import CardArguments, StagedModel, content_digests, stage_run, verified_stage, verify_staged


__all__ = [
    "CODE_FILES",
    "KEPT_TOKENS_PICTURE",
    "CardArguments",
    "Destination",
    "StagedModel",
    "connect",
    "content_digests",
    "describe_staged",
    "describe_upload",
    "eval_results_files",
    "make_card",
    "stage_run",
    "training_destination",
    "upload",
    "verified_stage",
    "verify_staged",
]
