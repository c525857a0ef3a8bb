"""Where the tensors of a run are: data lists on the CPU, and everything of a step on the GPU, with fake ones on `cuda`.

Not covered, because it needs a GPU: autocast, DeepSpeed's part of a step, and all values.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.models.fake_gpu import CUDA, backward, fake_gpu, place
from tests.training.runs import small_config, write_noise_clips
from video_swinv2.config import Config
from video_swinv2.data.datasets import Batch, collate
from video_swinv2.data.transforms import denormalise, normalise
from video_swinv2.distributed.world import World
from video_swinv2.engine.base import StepSettings
from video_swinv2.engine.gradients import poison_if_not_finite
from video_swinv2.engine.optimizer import build_optimizer, parameter_groups
from video_swinv2.engine.plain import PlainEngine
from video_swinv2.evaluation.forward import forward_views
from video_swinv2.models.preprocessing import IMAGENET_MEAN, IMAGENET_STD
from video_swinv2.training.tasks import simmim
from video_swinv2.training.tasks.base import Construction, Task
from video_swinv2.training.tasks.classification import Classification
from video_swinv2.training.tasks.simmim import Pretraining
from video_swinv2.weights.store import Preprocessing

TaskClass = Callable[[Config, Construction], Task]
pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
CLIP: dict[str, Any] = {"frames": 4, "image_size": 32}
BALANCED: dict[str, Any] = {"class_weights": "balanced"}


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


@contextmanager
def on_fake_gpu(task: Task, waits: list[str] | None = None) -> Iterator[Batch]:
    """Inside, the task's module is on the fake GPU. Yields a batch of samples, moved there as the loop does it."""
    assert task.val_samples is not None
    batch = collate([task.val_samples[(0, number % len(task.val_samples))] for number in range(4)])
    with fake_gpu(waits):
        place(task.module)
        yield batch.to(CUDA)


@pytest.fixture
def classification(images: Path, videos: Path) -> Callable[..., Classification]:
    """A function that builds the task on images or clips, with the given keys, on the meta device."""

    def build(kind: str, optim: Mapping[str, Any] | None = None, **augment: float) -> Classification:
        data = {"source": str(images), "image_size": 40} if kind == "images" else {"source": str(videos), **CLIP}
        model = {"name": "swinv2_nano", "window": 3, "drop_path": 0.1, "head_dropout": 0.1}
        return Classification(small_config(data=data, augment=augment, optim=optim, model=model), meta)

    return build


@pytest.fixture
def pretraining(videos: Path, images: Path) -> Callable[..., Pretraining]:
    """A function that builds SimMIM on images or clips, with the given `mask` keys, on the meta device."""

    def build(kind: str, **mask: Any) -> Pretraining:
        data = {"source": str(images), "image_size": 40} if kind == "images" else {"source": str(videos), **CLIP}
        return Pretraining(small_config(data=data, mask={"unit": 8, **mask}), meta)

    return build


@pytest.mark.parametrize("augment", [{}, {"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 0.8, "cutmix": 1.0}])
def test_the_loss_of_classification_stays_on_the_gpu(
    classification: Callable[..., Classification], augment: dict[str, float]
) -> None:
    """On images only: torchvision's type for clips, in which `mix` wraps them, cannot hold fake tensors."""
    task, waits = classification("images", BALANCED | {"label_smoothing": 0.1}, **augment), list[str]()
    with on_fake_gpu(task, waits) as batch:
        for _ in range(2):
            waits.clear()
            loss = poison_if_not_finite(task.loss(task.module.train(), batch))
            assert (loss.device, loss.shape) == (CUDA, ())
    assert not waits, "only the first micro-batch may wait, for the layouts of its windows"


def test_the_metrics_of_classification_accept_the_gpu(classification: Callable[..., Classification]) -> None:
    task = classification("clips")
    with on_fake_gpu(task) as batch, torch.no_grad():
        assert task.tally(task.module.eval(), batch).keys() == {"samples", "loss", "top1"}


@pytest.mark.parametrize(
    ("kind", "shape", "normalise_target"),
    [("images", "block", 0), ("images", "block", 7), ("clips", "block", 7), ("clips", "tube", 0)],
)
def test_simmim_stays_on_the_gpu(
    pretraining: Callable[..., Pretraining],
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    shape: str,
    normalise_target: int,
) -> None:
    """Masks, targets, loss, metrics and picture."""
    task = pretraining(kind, shape=shape, normalise_target=normalise_target)
    assert task.val_samples is not None
    shown = simmim.picture_samples(task.val_samples)  # read before, because files hold values
    monkeypatch.setattr(simmim, "picture_samples", lambda _: shown)
    waits: list[str] = []
    with on_fake_gpu(task, waits) as batch:
        for _ in range(2):
            waits.clear()
            loss = task.loss(task.module.train(), batch)
            assert (loss.device, loss.shape) == (CUDA, ())
        assert not waits, "only the first micro-batch may wait, for the layouts of its windows"
        with torch.no_grad():
            assert task.tally(task.module.eval(), batch).keys() == {"samples", "loss", "mean_loss"}
            picture = task.picture(task.module, CUDA)
        assert picture is not None
        assert picture.device.type == "cpu"


@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_steps_and_checkpoints_of_the_plain_engine_accept_the_gpu(
    classification: Callable[..., Classification], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a loss scale: clipping, the fused AdamW, averaged weights, and the state that a checkpoint holds.

    In a step, the CPU waits for the GPU only at its end, where it reads the norm and whether that is finite.
    """
    monkeypatch.setattr(torch.autograd, "backward", backward)
    task, world = classification("clips"), World(rank=0, size=1, local_rank=0, device=CUDA)
    waits: list[str] = []
    with on_fake_gpu(task, waits) as batch:
        groups = parameter_groups(task.module, task.encoder.depths, weight_decay=0.1)
        optimizer = build_optimizer(groups, betas=(0.9, 0.999), eps=1e-8, device=CUDA)
        step = StepSettings(clip_norm=1.0, ema=0.9)
        engine = PlainEngine(task.module.train(), optimizer, step, world, precision="fp16")
        engine.set_lr(1e-3)
        for _ in range(2):
            waits.clear()
            engine.backward(task.loss(engine.forward, batch))
            outcome = engine.step()
            assert outcome is not None
            assert outcome.applied
        assert waits == 2 * ["aten._local_scalar_dense.default"]
        state = engine.training_state()
        kinds = (state.weights, state.exp_avg, state.exp_avg_sq, state.ema)
        assert {tensor.device.type for kind in kinds for tensor in kind.values()} == {"cpu"}
        engine.load(state)
        engine.write_weights(engine.averaged_weights())
        moments = [value for held in optimizer.state.values() for value in held.values()]
        assert {tensor.device for tensor in (*task.module.parameters(), *moments)} == {CUDA}


@pytest.mark.parametrize("axes", [2, 3])
def test_normalisation_and_its_inverse_stay_on_the_gpu(axes: int) -> None:
    with fake_gpu():
        pixels = torch.empty((2, 3, *[8] * axes), dtype=torch.uint8, device=CUDA)
        inputs = normalise(pixels, IMAGENET_MEAN, IMAGENET_STD)
        assert (inputs.device, denormalise(inputs, IMAGENET_MEAN, IMAGENET_STD).device) == (CUDA, CUDA)


def test_views_are_scored_on_the_gpu(classification: Callable[..., Classification]) -> None:
    task, preprocessing = classification("clips"), Preprocessing(frames=4, frame_stride=1, image_size=(32, 32))
    with on_fake_gpu(task):
        pixels = torch.empty((5, 3, 4, 32, 32), dtype=torch.uint8)
        logits = forward_views(task.module.eval(), pixels, preprocessing, batch=2, bf16=False).logits
        assert (logits.device.type, logits.shape) == ("cpu", (5, 2))
