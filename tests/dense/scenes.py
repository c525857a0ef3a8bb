"""Draws images like those of a blood smear, for the pictures of the how-to pages of detection and segmentation.

    python -m tests.dense.scenes runs/scenes

writes the same images twice: `runs/scenes/boxes` in COCO's layout, and `runs/scenes/masks` as images with index masks.
The three kinds of cells differ in size, colour and inside; light, ground and noise differ from image to image. It is an
easy task, which shows how things are used and not how good a model is.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

CLASSES = ("red", "white", "platelet")
SIZE = (320, 240)  # width and height, pixels
SPLITS = {"train": 120, "val": 20, "test": 30}
COUNTS = {"red": (6, 15), "white": (0, 3), "platelet": (1, 5)}  # least and most, exclusive
RADII = {"red": (17.0, 23.0), "white": (27.0, 36.0), "platelet": (4.0, 7.0)}
BODIES = {"red": (222, 148, 140), "white": (190, 165, 200), "platelet": (150, 105, 165)}
INSIDES = {"red": (238, 190, 178), "white": (110, 70, 150)}  # the pale middle, and the nucleus
CORNERS = 40


def outline(centre: tuple[float, float], radius: float, random: Generator) -> list[tuple[float, float]]:
    """The corners of a round shape that is a little uneven."""
    turn, bump = random.uniform(0, 2 * math.pi), random.uniform(0.02, 0.12)
    angles = [2 * math.pi * corner / CORNERS for corner in range(CORNERS)]
    radii = [radius * (1 + bump * math.sin(2 * angle + turn)) for angle in angles]
    return [(centre[0] + r * math.cos(a), centre[1] + r * math.sin(a)) for a, r in zip(angles, radii, strict=True)]


def draw_cell(image: Image.Image, kind: str, corners: list[tuple[float, float]], random: Generator) -> None:
    """A cell with an outline of these corners."""
    draw = ImageDraw.Draw(image)
    draw.polygon(corners, fill=tuple((np.array(BODIES[kind]) + random.integers(-12, 13, 3)).tolist()))
    if kind in INSIDES:
        centre = np.mean(corners, axis=0) + random.uniform(-2, 2, 2)
        inner = centre + (np.array(corners) - centre) * random.uniform(0.35, 0.6)
        draw.polygon([tuple(corner) for corner in inner.tolist()], fill=INSIDES[kind])


def photograph(image: Image.Image, random: Generator) -> NDArray[np.uint8]:
    """The drawing as a microscope would show it: a little blurred, unevenly lit and noisy; uint8 (H, W, 3)."""
    width, height = SIZE
    blurred = np.asarray(image.filter(ImageFilter.GaussianBlur(random.uniform(0.6, 1.4))), dtype=np.float64)
    across, down = np.linspace(-1, 1, width), np.linspace(-1, 1, height)[:, None]
    light = random.uniform(0.8, 1.05) + random.uniform(-0.1, 0.1) * across + random.uniform(-0.1, 0.1) * down
    lit = blurred * light[..., None] * random.uniform(0.94, 1.06, 3) + random.normal(0, 6, (height, width, 3))
    return np.clip(lit, 0, 255).astype(np.uint8)


def draw_scene(random: Generator) -> tuple[Image.Image, Image.Image, list[dict[str, Any]]]:
    """An image, its mask (0 ground, 1 to 3 the classes) and its objects in COCO's form, later cells over earlier."""
    width, height = SIZE
    image, mask = Image.new("RGB", SIZE, (236, 226, 222)), Image.new("L", SIZE, 0)
    kinds = [kind for kind, (least, most) in COUNTS.items() for _ in range(random.integers(least, most))]
    objects = []
    for kind in random.permutation(kinds).tolist():
        label = CLASSES.index(kind) + 1
        centre = random.uniform(8, width - 8), random.uniform(8, height - 8)
        corners = outline(centre, random.uniform(*RADII[kind]), random)
        draw_cell(image, kind, corners, random)
        ImageDraw.Draw(mask).polygon(corners, fill=label)
        inside = np.clip(corners, 0, (width, height))
        (left, top), (right, bottom) = inside.min(axis=0).tolist(), inside.max(axis=0).tolist()
        objects.append({
            "category_id": label, "bbox": [left, top, right - left, bottom - top], "iscrowd": 0,
            "area": (right - left) * (bottom - top), "segmentation": [inside.flatten().tolist()],
        })  # fmt: skip
    return Image.fromarray(photograph(image, random)), mask, objects


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
            image, mask, objects = draw_scene(random)
            image.save(boxes / split / f"{number:03d}.png")
            image.save(masks / "images" / f"{number:03d}.png")
            mask.save(masks / "masks" / f"{number:03d}.png")
            names.append(f"{number:03d}\n")
            file = {"id": number, "file_name": f"{number:03d}.png", "width": SIZE[0], "height": SIZE[1]}
            content["images"].append(file)
            for found in objects:
                content["annotations"].append({"id": len(content["annotations"]) + 1, "image_id": number} | found)
        (boxes / "annotations" / f"instances_{split}.json").write_text(json.dumps(content), encoding="utf-8")
        (masks / f"{split}.txt").write_text("".join(names), encoding="utf-8")
    (masks / "classes.txt").write_text("\n".join(("ground", *CLASSES)) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.dense.scenes", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the two data sets are written")
    write_scenes(parser.parse_args().folder)
