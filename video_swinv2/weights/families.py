"""The sizes that weights were trained with, from the configuration beside them or from a table of released files.

The window and the log-CPB normaliser belong to the weights, but few files contain them. Nothing is guessed here: a
source is a configuration that came with the weights, or the exact name of a released file.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from video_swinv2.models.windows import PerAxis

SUPERVISED = "Microsoft's model zoo"
SIMMIM = "the zoo of SimMIM, all pre-trained with 192 pixels and window 12"
PATCH = 4  # of every image SwinV2
STAGES = 4


@dataclass(frozen=True)
class PretrainedConfig:
    """How the model was built when its weights were trained last."""

    image_size: PerAxis
    """(H, W) in pixels."""
    window: int
    """As configured, in tokens, before stages with smaller grids shrink it."""
    pretrained: PerAxis
    """Windows of an earlier training per stage, by which log-CPB is normalised; 0 if there was none."""
    source: str
    """Where this is known from, for messages."""

    @property
    def cpb_norm(self) -> list[PerAxis] | None:
        """The normaliser (h, w) per stage; None for an image that is not square, where libraries shrink differently."""
        if all(self.pretrained):
            return [(norm, norm) for norm in self.pretrained]
        height, width = self.image_size
        if height != width:
            return None
        native = [min(self.window, -(-height // (PATCH * 2**stage))) for stage in range(len(self.pretrained))]
        return [(norm or own,) * 2 for norm, own in zip(self.pretrained, native, strict=True)]


SIMMIM_PRETRAINING = PretrainedConfig((192, 192), 12, (12, 12, 12, 6), SIMMIM)
TORCHVISION = PretrainedConfig(
    (256, 256), 8, (8, 8, 8, 8), "torchvision, which divides by its own window, 8 in swin_v2_t, s, b"
)


def released_config_for(name: str) -> PretrainedConfig | None:
    """The configuration of a released file: by its stem, timm architecture (tag optional), or last part of a Hub id."""
    return _released_configs().get(name)


@functools.cache
def _released_configs() -> dict[str, PretrainedConfig]:
    """Every released SwinV2 and SimMIM file.

    Sizes and windows come from the model zoo and configs/swinv2 of microsoft/Swin-Transformer, names from its release
    v2.0.0, timm's swin_transformer_v2.py, and Microsoft's repositories on the Hub; SimMIM from zdaxie/SimMIM there.
    """
    small, big = ("tiny", "small", "base"), ("base", "large")
    rows: list[tuple[tuple[str, ...], str, str, str, int, int, PerAxis]] = [
        (small, "window8_256", "", "ms_in1k", 256, 8, (0, 0, 0, 0)),
        (small, "window16_256", "", "ms_in1k", 256, 16, (0, 0, 0, 0)),
        (big, "window12_192", "_22k", "ms_in22k", 192, 12, (0, 0, 0, 0)),
        (big, "window12to16_192to256", "_22kto1k_ft", "ms_in22k_ft_in1k", 256, 16, (12, 12, 12, 6)),
        (big, "window12to24_192to384", "_22kto1k_ft", "ms_in22k_ft_in1k", 384, 24, (12, 12, 12, 6)),
    ]
    released: dict[str, PretrainedConfig] = {}
    for sizes, windows, tail, tag, image_size, window, pretrained in rows:
        config = PretrainedConfig((image_size, image_size), window, pretrained, SUPERVISED)
        for size in sizes:
            microsoft, timm = f"swinv2_{size}_patch4_{windows}{tail}", f"swinv2_{size}_{windows}"
            names = (microsoft, microsoft.replace("_", "-"), timm, f"{timm}.{tag}")
            released |= dict.fromkeys(names, config)
    data: dict[str, tuple[str, ...]] = {"base": ("1kper10", "1kper20", "1kper50", "1k", "22k")}
    data |= {"small": data["base"][:4], "large": data["base"], "huge": data["base"][1:], "giant": data["base"][2:]}
    for size, sets in data.items():
        stems = [f"swinv2_{size}_{name}_{steps}k" for name in sets for steps in (125, 250, 500)]
        released |= dict.fromkeys(stems, SIMMIM_PRETRAINING)
        if size == "base":  # the only size whose fine-tuning configuration is published
            fine_tuning = PretrainedConfig((224, 224), 14, (12, 12, 12, 6), "configs/simmim of Microsoft's SwinV2-B")
            released |= dict.fromkeys([f"finetune_{stem}" for stem in stems], fine_tuning)
    return released


def config_from_layout(layout: str, names: Sequence[str]) -> PretrainedConfig | None:
    """What a layout implies: torchvision has one window, and only SimMIM's zoo has both `encoder.` and `rpe_mlp`."""
    if layout == "torchvision":
        return TORCHVISION
    return SIMMIM_PRETRAINING if layout == "SimMIM" and any(".rpe_mlp." in name for name in names) else None


def config_from_extras(extras: Mapping[str, Any]) -> PretrainedConfig | None:
    """From what a training checkpoint holds beside tensors: Microsoft's `config`, or timm's `arch` and `args`."""
    config = extras.get("config")
    if isinstance(config, Mapping) and isinstance(config.get("MODEL"), Mapping):
        settings, data = config["MODEL"].get("SWINV2"), config.get("DATA")
        if isinstance(settings, Mapping) and isinstance(data, Mapping):
            pretrained = settings.get("PRETRAINED_WINDOW_SIZES", (0,) * STAGES)
            return _checked(data.get("IMG_SIZE"), settings.get("WINDOW_SIZE"), pretrained, "the file's configuration")
    if isinstance(extras.get("arch"), str):
        arguments = extras.get("args")
        arguments = arguments if isinstance(arguments, Mapping) else {}
        changes = dict(arguments.get("model_kwargs") or {})
        if arguments.get("img_size"):
            changes["img_size"] = arguments["img_size"]
        return _timm(extras["arch"], changes, "the file's configuration")
    return None


def config_from_json(config: Mapping[str, Any]) -> PretrainedConfig | None:
    """From the config.json of a Hub folder, Hugging Face's or timm's."""
    if config.get("model_type") == "swinv2":
        pretrained = config.get("pretrained_window_sizes", (0,) * STAGES)
        return _checked(config.get("image_size"), config.get("window_size"), pretrained, "config.json")
    if isinstance(config.get("architecture"), str):
        changes = config.get("model_args")
        return _timm(config["architecture"], changes if isinstance(changes, Mapping) else {}, "config.json")
    return None


def classes_from_json(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Class names in the config.json of a Hub folder; () if there are none (`LABEL_3` is not a name)."""
    labels = config.get("id2label") or config.get("label_names") or {}
    if isinstance(labels, Sequence) and not isinstance(labels, str):
        labels = dict(enumerate(labels))
    if not isinstance(labels, Mapping):
        return ()
    ordered = {int(index): str(name) for index, name in labels.items() if re.fullmatch(r"\d+", str(index))}
    names = tuple(ordered.get(index, "") for index in range(len(ordered)))
    return () if any(re.fullmatch(r"|LABEL_\d+", name) for name in names) else names


def _timm(architecture: str, changes: Mapping[str, Any], source: str) -> PretrainedConfig | None:
    """A timm model: the sizes its name implies, replaced by the arguments it was created with."""
    released = released_config_for(architecture.split(".")[0])
    if released is None:
        return None
    return _checked(
        changes.get("img_size", released.image_size),
        changes.get("window_size", released.window),
        changes.get("pretrained_window_sizes", released.pretrained),
        f"{source} (timm's {architecture})",
    )


def _checked(image_size: Any, window: Any, pretrained: Any, source: str) -> PretrainedConfig | None:
    """A PretrainedConfig from unchecked values; None if any of them has the wrong type."""
    size = (image_size,) * 2 if isinstance(image_size, int) else image_size
    window = window[0] if isinstance(window, list | tuple) and len(set(window)) == 1 else window
    if not _all_integers(size, 1) or len(size) != 2 or not isinstance(window, int) or window < 1:
        return None
    return PretrainedConfig(tuple(size), window, tuple(pretrained), source) if _all_integers(pretrained, 0) else None


def _all_integers(values: Any, minimum: int) -> bool:
    return isinstance(values, list | tuple) and all(isinstance(v, int) and v >= minimum for v in values)
