"""Whether a change of the code leaves training as it was, to the bit: ten steps of each kind in two checkouts.

    python -m tests.same_losses OTHER_CHECKOUT

trains classification of clips and SimMIM of images, by the plain engine and by ZeRO-1, in fp32 from one seed, once with
the code of this checkout and once with that of the other, and compares every loss and gradient norm, and the weights
that are saved. Exit code 1 where anything differs. Both run with this Python and its packages, in one thread: how sums
are rounded depends on the number of threads.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import av
import numpy as np
import yaml
from PIL import Image
from safetensors import safe_open

from tests.conftest import REPOSITORY

STEPS = 10
SAMPLES = 40  # four per step: one epoch is ten steps


def write_clips(folder: Path) -> None:
    """Clips of noise in two classes."""
    rng = np.random.default_rng(0)
    lines = []
    for number in range(SAMPLES):
        path = folder / f"{number}.mp4"
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=16, options={"crf": "18", "preset": "ultrafast"})
            stream.height, stream.width, stream.pix_fmt = 32, 40, "yuv420p"
            for image in rng.integers(0, 255, (8, 32, 40, 3), dtype=np.uint8):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            container.mux(stream.encode())
        lines.append(f"{path.name} {number % 2}\n")
    for name, text in (("train", "".join(lines)), ("val", "".join(lines[:4])), ("classes", "down\nup\n")):
        (folder / f"{name}.txt").write_text(text)


def write_images(folder: Path) -> None:
    """Images of noise, a few of them to validate."""
    rng = np.random.default_rng(1)
    for split, count in (("train", SAMPLES), ("val", 4)):
        (folder / split / "noise").mkdir(parents=True)
        for number in range(count):
            pixels = rng.integers(0, 255, (48, 56, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / split / "noise" / f"{number}.png")


def recipe(verb: str, engine: str, data: Path, out: Path) -> dict[str, Any]:
    """A run of ten steps with everything random switched on."""
    clips = verb == "train"
    return {
        "out": str(out),
        "init": "scratch",
        "model": {"name": "swinv2_nano", "window": [2, 4, 4] if clips else 4, "drop_path": 0.2},
        "data": {"source": str(data / ("clips" if clips else "images")), "image_size": 32, "workers": 0}
        | ({"frames": 4, "frame_stride": 2} if clips else {}),
        "augment": {"crop_area": [0.5, 1.0]} | ({"rand_augment": 2, "erasing": 0.25, "mixup": 0.8} if clips else {}),
        "mask": {"unit": 8},
        "optim": {"epochs": 1, "lr": 1e-3, "batch": 4, "micro_batch": 2, "clip_norm": 5.0, "warmup_epochs": 0.2},
        "engine": {"engine": engine, "zero_stage": 1, "precision": "fp32", "device": "cpu"},
        "log_every": 1,
    }


def train(checkout: Path, verb: str, engine: str, data: Path, out: Path) -> dict[str, str]:
    """Ten steps by the code of `checkout`: each measure as its exact text, and a digest of the weights."""
    path = out.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(recipe(verb, engine, data, out)))
    environment = os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-m", "video_swinv2", verb, str(path)]
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{checkout}: {verb} ended with {done.returncode}\n{done.stdout}\n{done.stderr}")
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    found = {
        f"step {line['step']} {key}": float(line[key]).hex()
        for line in lines
        for key in ("train/loss", "train/grad_norm", "val/loss", "val/top1")
        if key in line
    }
    digest = hashlib.sha256()
    with safe_open(out / "last.safetensors", "pt") as weights:
        for name in sorted(weights.keys()):
            digest.update(name.encode() + weights.get_tensor(name).numpy().tobytes())
    return found | {"weights": digest.hexdigest()}


def main() -> int:
    """Compare this checkout with another."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("other", type=Path, help="a checkout of another commit")
    other: Path = parser.parse_args().other.resolve()
    different = 0
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch)
        for name, write in (("clips", write_clips), ("images", write_images)):
            (data / name).mkdir()
            write(data / name)
        for verb, engine in itertools.product(("train", "pretrain"), ("plain", "deepspeed")):
            ours, theirs = (
                train(checkout, verb, engine, data, data / f"{verb}-{engine}-{number}")
                for number, checkout in enumerate((REPOSITORY, other))
            )
            losses = sum("train/loss" in key for key in ours)
            apart = [key for key in ours | theirs if ours.get(key) != theirs.get(key)]
            different += bool(apart) or losses != STEPS
            kind = f"{'classes of clips' if verb == 'train' else 'SimMIM of images'}, {engine}"
            print(f"{kind}: {losses} losses, {len(ours)} values, {len(apart)} differ {apart[:3] or ''}")
            print(f"    {', '.join(f'{float.fromhex(v):.9g}' for k, v in ours.items() if 'train/loss' in k)}")
    print("the same, bit for bit" if not different else f"{different} of 4 runs differ")
    return int(bool(different))


if __name__ == "__main__":
    raise SystemExit(main())
