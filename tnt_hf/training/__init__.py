"""Training of scoring heads and backbones: settings, Trainer, images, resumption; needs `[train]`."""

from .arguments import EVALUATION_METRICS, ModelArguments, TntTrainingArguments
from .callbacks import AVERAGE_NAME, relevance_statistics
from .images import (
    BadImages,
    MixingCollator,
    SeededDraws,
    StreamedTrainingImages,
    TrainingImages,
    seeded,
    training_transform,
)
from .recipe import Recipe
from .resuming import checkpoint_to_resume, record_run
from .setup import checkpoint_name, classify_first_image, describe_training, freeze_idle_heads
from .trainer import TntTrainer, TrainingStopped, images_per_step


__all__ = [
    "AVERAGE_NAME",
    "EVALUATION_METRICS",
    "BadImages",
    "MixingCollator",
    "ModelArguments",
    "Recipe",
    "SeededDraws",
    "StreamedTrainingImages",
    "TntTrainer",
    "TntTrainingArguments",
    "TrainingImages",
    "TrainingStopped",
    "checkpoint_name",
    "checkpoint_to_resume",
    "classify_first_image",
    "describe_training",
    "freeze_idle_heads",
    "images_per_step",
    "record_run",
    "relevance_statistics",
    "seeded",
    "training_transform",
]
