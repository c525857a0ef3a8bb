"""Where the tensors of a run are: data lists on the CPU, and everything of a step on the GPU, with fake ones on `cuda`.

Not covered, because it needs a GPU: autocast, DeepSpeed's part of a step, and all values.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.training.runs import small_config, write_noise_clips
from video_swinv2.config import Config
from video_swinv2.training.tasks.base import Construction, Task
from video_swinv2.training.tasks.classification import Classification
from video_swinv2.training.tasks.simmim import Pretraining

TaskClass = Callable[[Config, Construction], Task]
CLIP: dict[str, Any] = {"frames": 4, "image_size": 32}
BALANCED = {"class_weights": "balanced"}


@pytest.fixture
def videos(tmp_path: Path, write_video: Callable[..., Path]) -> Path:
    """A labelled data set of three clips."""
    return write_noise_clips(tmp_path / "videos", write_video, [0, 1, 1], ["zero", "one"])


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A labelled data set of four images, for which no index exists yet."""
    for number in range(8):
        split = "train" if number < 4 else "val"
        path = tmp_path / "images" / split / f"class{number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((40, 48, 3), 20 * number, dtype=np.uint8)).save(path)
    return tmp_path / "images"


def meta(*_: object) -> torch.device:
    """A construction in which every new tensor is on the meta device, as it may be on the GPU in DeepSpeed's."""
    return torch.device("meta")


def tensors_of(value: object) -> list[Tensor]:
    """All tensors that a loader's worker would receive with `value`."""
    found = []

    class Collector(pickle.Pickler):
        def persistent_id(self, item: object) -> object:
            if isinstance(item, Tensor):
                found.append(item)
            return len(found) if isinstance(item, Tensor) else None

    Collector(io.BytesIO()).dump(value)
    return found


@pytest.mark.parametrize(
    ("make_task", "source", "data", "optim"),
    [
        (Classification, "videos", CLIP, BALANCED),
        (Classification, "images", {}, BALANCED),
        (Pretraining, "images", {}, {}),
        (Pretraining, "videos", CLIP, {}),
        (Pretraining, "mixture", {"frames_per_video": 2}, {}),
    ],
)
def test_only_the_model_is_built_in_the_construction(
    make_task: TaskClass,
    source: str,
    data: Mapping[str, Any],
    optim: Mapping[str, Any],
    videos: Path,
    images: Path,
) -> None:
    """Lists of samples that become CUDA tensors end the forked workers of a loader, or the scan for the index."""
    mixture = [{"path": str(images), "weight": 1.0}, {"path": str(videos), "weight": 2.0}]
    given = mixture if source == "mixture" else str({"videos": videos, "images": images}[source])
    config = small_config(data={"source": given, "image_size": 64, **data}, optim=optim, mask={"unit": 8})
    task = make_task(config, meta)
    assert {parameter.device.type for parameter in task.module.parameters()} == {"meta"}
    assert task.val_samples is not None
    lists = tensors_of((task.train_samples, task.val_samples))
    assert {tensor.device.type for tensor in lists} == {"cpu"}
    if isinstance(task, Classification):
        assert task.class_weights is not None
        assert task.class_weights.device.type == "cpu"
    assert task.train_samples[(0, 0)].pixels.device.type == "cpu"


def test_lists_that_are_built_in_the_construction_are_found(videos: Path) -> None:
    """The test above can fail: the whole task inside, as it once was."""
    with meta():
        task = Classification(small_config(data={"source": str(videos), **CLIP}), meta)
    assert "meta" in {tensor.device.type for tensor in tensors_of(task.train_samples)}
