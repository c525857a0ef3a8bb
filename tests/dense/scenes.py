"""Draws the images of the how-to pages of detection and segmentation: shapes of three kinds on a noisy ground.

    python -m tests.dense.scenes runs/scenes

writes the same images twice: `runs/scenes/boxes` in COCO's layout, with outlines, and `runs/scenes/masks` as images
with index masks. The pictures in docs/images are of models trained on them, as the pages say.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageDraw

CLASSES = ("disc", "square", "triangle")
SIZE = (160, 120)  # width and height, pixels
SPLITS = {"train": 120, "val": 20, "test": 20}
CORNERS = {"disc": 40, "square": 4, "triangle": 3}


def outline(kind: str, centre: tuple[float, float], radius: float, turn: float) -> list[tuple[float, float]]:
    """The corners of a shape."""
    angles = [turn + 2 * math.pi * corner / CORNERS[kind] for corner in range(CORNERS[kind])]
    return [(centre[0] + radius * math.cos(angle), centre[1] + radius * math.sin(angle)) for angle in angles]


def draw_scene(random: Generator) -> tuple[Image.Image, Image.Image, list[dict[str, Any]]]:
    """An image, its mask (0 ground, 1 to 3 the classes) and its objects in COCO's form, later shapes over earlier."""
    width, height = SIZE
    ground = random.integers(90, 150, 3)
    image, mask = Image.new("RGB", SIZE, tuple(ground.tolist())), Image.new("L", SIZE, 0)
    shapes = []
    for _ in range(random.integers(2, 6)):
        label = int(random.integers(len(CLASSES)))
        centre = (random.uniform(10, width - 10), random.uniform(10, height - 10))
        corners = outline(CLASSES[label], centre, random.uniform(10, 28), random.uniform(0, 2 * math.pi))
        colour = tuple(random.integers(0, 256, 3).tolist())
        ImageDraw.Draw(image).polygon(corners, fill=colour)
        ImageDraw.Draw(mask).polygon(corners, fill=label + 1)
        inside = [(min(max(x, 0), width), min(max(y, 0), height)) for x, y in corners]
        (left, top), (right, bottom) = np.min(inside, axis=0), np.max(inside, axis=0)
        shapes.append({
            "category_id": label + 1, "bbox": [left, top, right - left, bottom - top], "iscrowd": 0,
            "area": (right - left) * (bottom - top), "segmentation": [[float(n) for corner in inside for n in corner]],
        })  # fmt: skip
    noise = random.normal(0, 14, (height, width, 3))
    pixels = np.clip(np.asarray(image, dtype=np.float64) + noise, 0, 255).astype(np.uint8)
    return Image.fromarray(pixels), mask, shapes


def write_scenes(folder: Path, seed: int = 0) -> None:
    """Write both data sets."""
    random = np.random.default_rng(seed)
    boxes, masks = folder / "boxes", folder / "masks"
    for path in (boxes / "annotations", masks / "images", masks / "masks"):
        path.mkdir(parents=True, exist_ok=True)
    categories = [{"id": number, "name": name} for number, name in enumerate(CLASSES, 1)]
    number = 0
    for split, count in SPLITS.items():
        (boxes / split).mkdir(exist_ok=True)
        content: dict[str, list[Any]] = {"images": [], "annotations": [], "categories": categories}
        names = []
        for _ in range(count):
            number += 1
            image, mask, shapes = draw_scene(random)
            image.save(boxes / split / f"{number:03d}.png")
            image.save(masks / "images" / f"{number:03d}.png")
            mask.save(masks / "masks" / f"{number:03d}.png")
            names.append(f"{number:03d}\n")
            file = {"id": number, "file_name": f"{number:03d}.png", "width": SIZE[0], "height": SIZE[1]}
            content["images"].append(file)
            for shape in shapes:
                content["annotations"].append({"id": len(content["annotations"]) + 1, "image_id": number} | shape)
        (boxes / "annotations" / f"instances_{split}.json").write_text(json.dumps(content), encoding="utf-8")
        (masks / f"{split}.txt").write_text("".join(names), encoding="utf-8")
    (masks / "classes.txt").write_text("\n".join(("ground", *CLASSES)) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.dense.scenes", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    write_scenes(parser.parse_args().folder)
