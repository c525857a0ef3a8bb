"""Finds the sizes that weights were trained with, in a configuration beside them or in a table of released files.

The window and the log-CPB normaliser belong to the weights, but few files contain them. Nothing is guessed here: sizes
come from a configuration stored with the weights, from a layout that implies them, or from the exact name of a released
file.
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
PATCH = 4  # side of a patch in pixels, the same in every image SwinV2
MAX_SIZE = 2**13  # of an image in pixels, and of everything else
STAGES = 4  # likewise the same in all of them, and the default of every library


@dataclass(frozen=True)
class PretrainedConfig:
    """The sizes of the model in the last training of its weights."""

    image_size: PerAxis
    """(H, W) in pixels."""
    window: int
    """The configured window in tokens. In a stage whose grid is smaller, the window shrinks to the grid."""
    pretrained: PerAxis
    """The window of each stage in an earlier training, which log-CPB is then still normalised by; 0 without one."""
    source: str
    """Where these sizes come from, for messages."""

    @property
    def cpb_norm(self) -> list[PerAxis] | None:
        """The log-CPB normaliser (h, w) of each stage.

        None if it depends on the shrunken window of an image that is not square: libraries shrink it differently then.
        """
        if all(self.pretrained):
            return [(norm, norm) for norm in self.pretrained]
        height, width = self.image_size
        if height != width:
            return None
        # The grid of stage s has ceil(height / (4 * 2^s)) tokens per axis: patches of 4, halved by each merging.
        native = [min(self.window, -(-height // (PATCH * 2**stage))) for stage in range(len(self.pretrained))]
        return [(norm or own,) * 2 for norm, own in zip(self.pretrained, native, strict=True)]


SIMMIM_PRETRAINING = PretrainedConfig((192, 192), 12, (12, 12, 12, 6), SIMMIM)
TORCHVISION = PretrainedConfig(
    (256, 256), 8, (8, 8, 8, 8), "torchvision, which divides by its own window, 8 in swin_v2_t, s, b"
)


def released_config_for(name: str) -> PretrainedConfig | None:
    """The configuration of a released file, or None for an unknown name.

    `name` is the stem of the file, a timm architecture with or without its tag, or the last part of a Hub id.
    """
    return _released_configs().get(name)


@functools.cache
def _released_configs() -> dict[str, PretrainedConfig]:
    """The configurations of all released SwinV2 and SimMIM files, by name.

    Sizes and windows come from the model zoo and configs/swinv2 of microsoft/Swin-Transformer. Names come from its
    release v2.0.0, timm's swin_transformer_v2.py and Microsoft's repositories on the Hub, and those of SimMIM from
    zdaxie/SimMIM on the Hub.
    """
    # Model sizes, windows part of the name, tail of Microsoft's name, timm's tag, pixels, window, earlier windows.
    # "window12to16_192to256": trained with 192 pixels and window 12, then fine-tuned with 256 pixels and window 16. The
    # last stage has a grid of 6 at 192 pixels, hence 6 instead of 12.
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
    # SimMIM: a size was trained on several subsets of ImageNet, each for 125k, 250k and 500k steps, not every size on
    # every subset.
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
    """The configuration that a layout implies, or None.

    torchvision has one window for all its models. A SimMIM file that calls the bias network `rpe_mlp` can only come
    from SimMIM's model zoo, all of which was trained with the same sizes.
    """
    if layout == "torchvision":
        return TORCHVISION
    return SIMMIM_PRETRAINING if layout == "SimMIM" and any(".rpe_mlp." in name for name in names) else None


def config_from_extras(extras: Mapping[str, Any]) -> PretrainedConfig | None:
    """The configuration that a training checkpoint holds beside its tensors, or None.

    Microsoft's code stores a yacs `config`, timm's training script stores `arch` and `args`.
    """
    config = extras.get("config")
    if isinstance(config, Mapping) and isinstance(config.get("MODEL"), Mapping):
        settings, data = config["MODEL"].get("SWINV2"), config.get("DATA")
        if isinstance(settings, Mapping) and isinstance(data, Mapping):
            pretrained = settings.get("PRETRAINED_WINDOW_SIZES", (0,) * STAGES)
            size, window, depths = data.get("IMG_SIZE"), settings.get("WINDOW_SIZE"), settings.get("DEPTHS")
            return _checked(size, window, pretrained, depths, "the file's configuration")
    if isinstance(extras.get("arch"), str):
        arguments = extras.get("args")
        arguments = arguments if isinstance(arguments, Mapping) else {}
        given = arguments.get("model_kwargs")
        changes = dict(given) if isinstance(given, Mapping) else {}
        if arguments.get("img_size"):
            changes["img_size"] = arguments["img_size"]
        return _timm(extras["arch"], changes, "the file's configuration")
    return None


def config_from_json(config: Mapping[str, Any]) -> PretrainedConfig | None:
    """The configuration in the config.json of a Hub folder, in Hugging Face's format or timm's; None for others."""
    if config.get("model_type") == "swinv2":
        pretrained = config.get("pretrained_window_sizes", (0,) * STAGES)
        size, window, depths = (config.get(key) for key in ("image_size", "window_size", "depths"))
        return _checked(size, window, pretrained, depths, "config.json")
    if isinstance(config.get("architecture"), str):
        changes = config.get("model_args")
        return _timm(config["architecture"], changes if isinstance(changes, Mapping) else {}, "config.json")
    return None


def classes_from_json(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Class names from the config.json of a Hub folder, in order; () if there are none.

    Hugging Face fills in `LABEL_3` for a class without a name, which does not count as one.
    """
    labels = config.get("id2label") or config.get("label_names") or {}
    if isinstance(labels, Sequence) and not isinstance(labels, str):
        labels = dict(enumerate(labels))
    if not isinstance(labels, Mapping):
        return ()
    # JSON keys are strings, and need not be sorted. A missing number leaves an empty name, which is refused below.
    ordered = {int(index): str(name) for index, name in labels.items() if re.fullmatch(r"\d{1,9}", str(index))}
    names = tuple(ordered.get(index, "") for index in range(len(ordered)))
    return () if any(re.fullmatch(r"|LABEL_\d+", name) for name in names) else names


def _timm(architecture: str, changes: Mapping[str, Any], source: str) -> PretrainedConfig | None:
    """The configuration of a timm model: the sizes that its name implies, overridden by the arguments in `changes`."""
    released = released_config_for(architecture.split(".")[0])
    if released is None:
        return None
    return _checked(
        changes.get("img_size", released.image_size),
        changes.get("window_size", released.window),
        changes.get("pretrained_window_sizes", released.pretrained),
        changes.get("depths"),
        f"{source} (timm's {architecture})",
    )


def _checked(image_size: Any, window: Any, pretrained: Any, depths: Any, source: str) -> PretrainedConfig | None:
    """A PretrainedConfig from values read from a file; None if any of them has the wrong type or range.

    `depths` may be missing (None), which means the library's default of four stages.
    """
    size = (image_size,) * 2 if isinstance(image_size, int) else image_size
    window = window[0] if _all_integers(window, 1) and len(set(window)) == 1 else window
    if not _all_integers((*size, window) if isinstance(size, list | tuple) else None, 1) or len(size) != 2:
        return None
    depths = (1,) * STAGES if depths is None else depths
    if not _all_integers(pretrained, 0) or not _all_integers(depths, 1):
        return None
    # The libraries look up a stage's earlier window by the number of the stage, and their default has four entries. A
    # model with fewer stages does not use the last of them.
    return PretrainedConfig(tuple(size), window, tuple(pretrained[: len(depths)]), source)


def _all_integers(values: Any, minimum: int) -> bool:
    """Whether a value from a file is a list of integers, from `minimum` to what is plausible for any size."""
    return isinstance(values, list | tuple) and all(isinstance(v, int) and minimum <= v <= MAX_SIZE for v in values)
