"""Finds the task that a configuration asks for."""

from __future__ import annotations

from video_swinv2.config import Config
from video_swinv2.errors import UsageError
from video_swinv2.training.tasks.base import MakeTask
from video_swinv2.training.tasks.classification import Classification
from video_swinv2.training.tasks.detection import Detection
from video_swinv2.training.tasks.segmentation import Segmentation
from video_swinv2.training.tasks.simmim import Pretraining

TASKS: dict[str, MakeTask] = {
    "classification": Classification,
    "detection": Detection,
    "segmentation": Segmentation,
    "simmim": Pretraining,
}


def task_to_train(config: Config) -> MakeTask:
    """What `train` learns: the key `task`, by default classification."""
    return TASKS[config.task or "classification"]


def task_to_pretrain(config: Config) -> MakeTask:
    """What `pretrain` learns, which is SimMIM. Raises UsageError if the key `task` names another task."""
    if config.task not in (None, "simmim"):
        raise UsageError(f"task: {config.task} is for `train`; omit it in `pretrain`, or set it to simmim")
    return Pretraining
