"""Parameters and multiply-accumulates: the specification's figures, and ours counted without any formula."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal

import torch
from torch.utils.flop_counter import FlopCounterMode

import video_swinv2 as vs
from video_swinv2.models.swinv2 import SwinV2

Setting = tuple[int | None, int, tuple[int, ...]]
"""Frames (None for images), pixels per side, window."""


@dataclass(frozen=True)
class Count:
    """Parameters of a model: `patch_time` is None for images, `extra` tells whether the additional LayerNorms count."""

    name: str
    classes: int
    patch_time: int | None
    parameters: int
    extra: bool = True


def _counts(classes: int, patch_time: int | None, **parameters: int) -> list[Count]:
    return [Count(f"swinv2_{size}", classes, patch_time, count) for size, count in parameters.items()]


T, S, B, L, H, G = "tiny", "small", "base", "large", "huge", "giant"
COUNTS = [  # sections 2.1 and 4.7 of the specification; official code, timm, Hugging Face
    *_counts(0, None, tiny=27_578_154, small=48_959_418, base=86_893_816, large=195_202_932),
    *_counts(0, None, huge=655_219_370, giant=2_997_843_680),
    Count("swinv2_huge", 0, None, 655_210_922, extra=False),
    Count("swinv2_giant", 0, None, 2_997_815_008, extra=False),
    Count("swinv2_giant_1b", 0, None, 1_060_976_996, extra=False),
    *_counts(1000, None, tiny=28_347_154, small=49_728_418, base=87_918_816, large=196_739_932),
    *_counts(1000, None, huge=658_036_370, giant=3_001_940_680),
    *_counts(21_841, None, tiny=44_373_883, small=65_755_147, base=109_280_841, large=228_772_549),
    *_counts(0, 2, tiny=27_588_906, small=48_976_314, base=86_912_248, large=195_224_436),
    *_counts(400, 1, tiny=27_891_898, small=49_279_306, base=87_316_104, large=195_830_020),
    *_counts(400, 2, tiny=27_896_506, small=49_283_914, base=87_322_248, large=195_839_236),
    *_counts(400, 2, huge=656_375_354, giant=2_999_532_656),
]

# Giga multiply-accumulates as the specification prints them; a half of the last digit is rounding, not difference.
IMAGE_MACS: list[tuple[Setting, dict[str, str]]] = [  # section 2.2, 1000 classes
    ((None, 256, (8, 8)), {T: "5.926", S: "11.515", B: "20.286"}),
    ((None, 256, (16, 16)), {T: "6.605", S: "12.647", B: "21.796", L: "47.491"}),
    ((None, 192, (12, 12)), {B: "11.761", L: "25.965"}),
    ((None, 224, (14, 14)), {B: "16.323", L: "35.814"}),
    ((None, 384, (24, 24)), {B: "54.748", L: "115.417"}),
]
CLIP_MACS: list[tuple[Setting, dict[str, str]]] = [  # section 4.7, 400 classes, patches of two frames
    ((32, 224, (8, 7, 7)), {T: "87.764", S: "165.7", B: "281.3", L: "603.3"}),
    ((16, 224, (8, 7, 7)), {T: "43.9", S: "82.8", B: "140.7", L: "301.6"}),
    ((16, 192, (8, 12, 12)), {T: "44.3", S: "80.9", B: "130.1", L: "261.8"}),
    ((16, 224, (8, 14, 14)), {T: "69.4", S: "125.3", B: "197.3", L: "386.6"}),
    ((16, 256, (8, 8, 8)), {T: "60.9", S: "114.1", B: "191.5", L: "405.7"}),
    ((16, 256, (8, 16, 16)), {T: "104.4", S: "186.5", B: "288.2", L: "550.6", G: "6.14e3"}),
    ((32, 256, (8, 8, 8)), {T: "121.8", S: "228.1", B: "383.1", L: "811.3"}),
    ((32, 256, (8, 16, 16)), {T: "208.8", S: "373.1", B: "576.3", L: "1101.3"}),
    ((16, 320, (8, 20, 20)), {T: "214.8", S: "377.1", B: "564.4", L: "1031.6", G: "10.4e3"}),
    ((16, 384, (8, 24, 24)), {T: "400.2", S: "693.7", B: "1013.8", L: "1787.0", G: "16.5e3"}),
]


def parameters(count: Count) -> int:
    """The parameters of our model, built without memory."""
    with torch.device("meta"):
        model = vs.create_model(
            count.name,
            num_classes=count.classes,
            frames=None if count.patch_time is None else 16,
            patch_size=None if count.patch_time is None else (count.patch_time, 4, 4),
        )
    return sum(p.numel() for name, p in model.named_parameters() if count.extra or ".enorm." not in name)


def giga_macs(size: str, setting: Setting) -> float:
    """Giga multiply-accumulates of one forward pass, from the products that torch sees.

    Every convolution and matrix product of a pass on the meta device is counted at its true shapes, without the log-CPB
    MLP (the specification's definition). Its 2-D figures also hold one per normalised number, at most 0.09 % of all.
    """
    frames, pixels, window = setting
    with torch.device("meta"):
        model: SwinV2 = vs.create_model(
            f"swinv2_{size}",
            num_classes=1000 if frames is None else 400,
            frames=frames,
            image_size=pixels,
            window=window,
            attention="eager",
        ).eval()
        x = torch.empty(1, 3, *(() if frames is None else (frames,)), pixels, pixels)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(x)
    per_module = counter.get_flop_counts()
    bias = sum(sum(per_module[name].values()) for name in per_module if name.endswith(".cpb_mlp"))
    return (counter.get_total_flops() - bias) / 2e9


def beyond_rounding(got: float, printed: str) -> float:
    """Relative difference to a printed figure, less the half of its last digit that printing may have cost."""
    figure = Decimal(printed)
    half = Decimal(1).scaleb(int(figure.as_tuple().exponent)) / 2
    return max(0.0, abs(got - float(figure)) - float(half)) / float(figure)
