"""What must come out the same: a still clip and its image, any order of frames at inflation, every backend."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

import video_swinv2 as vs
from tests.models.reference import randomise
from video_swinv2.models import swinv2
from video_swinv2.models.attention import Backend
from video_swinv2.models.swinv2 import SwinV2
from video_swinv2.models.windows import PerAxis, WindowLayout, padded_grid, shrink_window, window_layout


@dataclasses.dataclass(frozen=True)
class Still:
    """A still clip of `frames`, for a model with windows of `window` tokens in time and patches of `patch` frames."""

    window: int
    frames: int
    patch: int

    @property
    def tokens(self) -> int:
        """Tokens in time."""
        return -(-self.frames // self.patch)

    @property
    def is_padded(self) -> bool:
        """Whether the last window in time is not full."""
        return self.tokens > self.window and self.tokens % self.window != 0


STILL = (
    *(Still(window, 1, patch) for window, patch in ((1, 1), (8, 1), (8, 2))),
    # whole windows, with one window in time and with several, which shift
    *(Still(*case) for case in ((8, 8, 1), (8, 16, 2), (8, 16, 1), (4, 16, 1), (8, 24, 1), (16, 32, 2))),
    # the last window in time padded; in the last case the last patch as well
    *(Still(*case) for case in ((8, 12, 1), (4, 7, 1), (4, 5, 1), (3, 10, 1), (8, 24, 2), (2, 5, 1), (3, 9, 2))),
)


def image_model(name: str = "swinv2_nano", size: int = 64, window: int = 4, attention: Backend = "eager") -> SwinV2:
    """An image model with random weights, the same for every backend."""
    return randomise(
        vs.create_model(name, num_classes=7, image_size=size, window=window, attention=attention), seed=size
    )


def inflated(image: SwinV2, frames: int, window: int, patch: int) -> SwinV2:
    """The clip model that `load_weights` makes of a saved image model; the window in space stays."""
    clip = vs.create_model(
        image.name,
        num_classes=image.num_classes,
        frames=frames,
        image_size=image.image_size,
        patch_size=(patch, *image.patch_size),
        window=(window, *image.window),
        attention=image.attention,
    )
    height, width = image.image_size
    preprocessing = vs.Preprocessing(frames=None, frame_stride=1, image_size=(height, width))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "image.safetensors"
        classes = [f"class {i}" for i in range(image.num_classes)]
        vs.save_model(image, file, classes=classes, preprocessing=preprocessing)
        vs.load_weights(clip, file, classes=classes)
    return clip.eval()


def still_difference(image: SwinV2, case: Still) -> tuple[float, float]:
    """Largest differences between a still clip and its image, logits and final features of every frame."""
    return tuple((got - expected).abs().max().item() for got, expected in still_answers(image, case))


def still_answers(image: SwinV2, case: Still) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Of a still clip and of its image: logits, and final features of every frame."""
    clip = inflated(image, case.frames, case.window, case.patch)
    x = torch.randn(1, 3, *image.image_size, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        features = image.forward_features(x)
        frames = clip.forward_features(x[:, :, None].expand(-1, -1, case.frames, -1, -1))
        logits = clip.forward_head(frames), image.forward_head(features)
    return logits, (frames, features[:, None].expand_as(frames))


@contextmanager
def padding_attended() -> Iterator[None]:
    """Models built inside attend to padding, as Video Swin, torchvision and timm do: the mistake, for comparison.

    Each layout is made for the padded grid, as if all of it were real, and still pads and crops the true one, which its
    moves of single tokens would not do.
    """

    def careless(grid: PerAxis, window: Sequence[int], shifted: bool, device: torch.device) -> WindowLayout:
        whole = window_layout(padded_grid(grid, shrink_window(window, grid)[0]), window, shifted, device)
        return dataclasses.replace(whole, grid=grid, moves=None)

    with mock.patch.object(swinv2, "window_layout", careless):
        yield


def order_difference(clip: SwinV2, frames: int) -> float:
    """Largest difference of the logits between a random clip and the same frames in another order."""
    plain, shuffled = order_answers(clip, frames)
    return (plain - shuffled).abs().max().item()


def order_answers(clip: SwinV2, frames: int) -> tuple[Tensor, Tensor]:
    """Logits of a random clip, and of the same frames in another order."""
    x = torch.randn(1, 3, frames, *clip.image_size, generator=torch.Generator().manual_seed(3))
    order = torch.randperm(frames, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        return clip(x), clip(x[:, :, order])


def perturb_time(clip: SwinV2) -> SwinV2:
    """The bias network's column for the offset in time, zero at inflation, as learning would leave it."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for block in clip.blocks():
            block.attn.get_parameter("cpb_mlp.0.weight")[:, 0].normal_(std=0.4, generator=generator)
    return clip


GRADIENT_KINDS = ("input", "qkv", "q_bias", "v_bias", "logit_scale", "cpb_mlp")


def can_differentiate(attention: Backend) -> bool:
    """torch's flex_attention has no gradients on CPUs."""
    return attention != "flex" or torch.cuda.is_available()


def answers(
    attention: Backend,
    frames: int,
    size: tuple[int, int],
    dtype: torch.dtype = torch.float32,
    *,
    device: str | None = None,
) -> dict[str, Tensor]:
    """Logits of a small clip model, "logits", and the gradients of its parameters and its "input", by name.

    Windows (2, 4, 4) over `frames` and `size` pixels; two frames and 4 x 4 pixels are a token. Computed on `device`, by
    default the CPU if the backend has gradients there, and returned on the CPU.
    """
    device = device or ("cuda" if attention == "flex" else "cpu")
    model = randomise(
        vs.create_model("swinv2_nano", num_classes=3, frames=8, image_size=64, window=(2, 4, 4), attention=attention)
    ).to(device, dtype)
    x = torch.randn(2, 3, frames, *size, generator=torch.Generator().manual_seed(6)).to(device, dtype).requires_grad_()
    logits = model(x)
    logits.square().sum().backward()
    found = {"logits": logits.detach(), "input": x.grad} | {name: p.grad for name, p in model.named_parameters()}
    if any(tensor is None or not tensor.any() for tensor in found.values()):
        raise AssertionError("a gradient that is zero proves nothing")
    return {name: tensor.cpu() for name, tensor in found.items()}


def worst(expected: dict[str, Tensor], got: dict[str, Tensor], kind: str) -> float:
    """Largest difference among all tensors whose name has `kind`, each in units of its own largest value."""
    pairs = [(expected[name], got[name]) for name in expected if kind in name]
    return max(((a - b).abs().max() / a.abs().max()).item() for a, b in pairs)
