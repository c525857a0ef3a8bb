"""Command-line verb `convert`, and the argument type for sizes per axis, such as `8,7,7`, that other verbs share."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from video_swinv2.command import MAX_SIZE, Verbs, add_verb, whole_number, whole_numbers
from video_swinv2.escaping import for_terminal
from video_swinv2.files import json_text


def add_weights_verbs(verbs: Verbs[argparse.ArgumentParser]) -> None:
    """Add `convert`."""
    text = "convert a checkpoint in any supported layout to a model file, or change the sizes of a model file"
    example = "video-swinv2 convert swinv2_tiny_patch4_window8_256.pth tiny.safetensors --frames 16 --window 8,7,7"
    verb = add_verb(verbs, "convert", _convert, text, example)
    verb.add_argument(
        "checkpoint", type=Path, metavar="CHECKPOINT", help="file or Hub-style folder in any supported layout"
    )
    verb.add_argument("out", type=Path, metavar="OUT", help="file name ending in .safetensors, or a folder")
    verb.add_argument("--model", metavar="NAME", help="model name (default: found from the shapes of the tensors)")
    verb.add_argument(
        "--frames",
        type=whole_number(most=MAX_SIZE),
        metavar="N",
        help="frames per clip; makes a clip model of image weights by inflation",
    )
    verb.add_argument("--image-size", type=axis_sizes, metavar="H,W", help="pixels (default: as trained)")
    verb.add_argument(
        "--patch-size", type=axis_sizes, metavar="T,H,W", help="pixels (default: as trained, and 2 frames)"
    )
    verb.add_argument(
        "--window", type=axis_sizes, metavar="T,H,W", help="tokens (default: as trained, and 8 along time)"
    )
    verb.add_argument(
        "--cpb-norm",
        type=whole_numbers(),
        metavar="12,12,12,6",
        help="window the weights were trained with, per stage, for checkpoints that do not record it",
    )
    verb.add_argument("--classes", type=Path, metavar="FILE", help="class names, one per line")
    verb.add_argument(
        "--class-map",
        type=Path,
        metavar="FILE",
        help="rows of the classifier to keep, one index per line (such as map22kto1k.txt)",
    )
    verb.add_argument(
        "--frame-stride",
        type=whole_number(most=MAX_SIZE),
        metavar="N",
        help="video frames from one clip frame to the next (default: as trained, or 1)",
    )
    verb.add_argument("--json", action="store_true", help="print what was loaded as JSON")


def _convert(options: argparse.Namespace) -> None:
    from video_swinv2.weights.convert import convert
    from video_swinv2.weights.pretrained import RequestedSizes

    account = convert(
        options.checkpoint,
        options.out,
        RequestedSizes(options.frames, options.image_size, options.patch_size, options.window),
        name=options.model,
        cpb_norm=options.cpb_norm,
        classes=options.classes,
        class_map=options.class_map,
        frame_stride=options.frame_stride,
    )
    print(
        json_text(dataclasses.asdict(account), indent=1)
        if options.json
        else f"{account}\n{for_terminal(f'wrote {options.out}')}"
    )


def axis_sizes(text: str) -> int | tuple[int, ...]:
    """Parse sizes per axis, such as `8,7,7`, or a single number for all axes, for argparse."""
    numbers = whole_numbers()(text)
    return numbers[0] if len(numbers) == 1 else numbers
