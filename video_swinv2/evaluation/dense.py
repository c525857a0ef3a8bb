"""What the tests of segmenters and detectors share: each image once, the record of a test, and its folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from video_swinv2.data.manifest import class_list_hash
from video_swinv2.distributed.agreement import exclusive_folder, require_agreement
from video_swinv2.distributed.world import World
from video_swinv2.errors import UsageError
from video_swinv2.evaluation.overrides import TestOverrides
from video_swinv2.evaluation.planning import record_machine
from video_swinv2.files import atomic_write, sha256
from video_swinv2.progress import Progress
from video_swinv2.records import Record, read_record
from video_swinv2.weights.store import ModelCard, model_file

ADVICE = "start the same command again"  # if a process is lost


class _Earlier(Record, extra="ignore"):
    """What says which test a results.json is of."""

    model_sha256: str
    data_fingerprint: str
    protocol_numbers: dict[str, Any]


def make_record(
    task: str,
    model_path: Path | str,
    card: ModelCard,
    data: Path | str,
    split: str,
    fingerprint: str,
    classes: Sequence[str],
    protocol_numbers: Mapping[str, Any],
    settings: TestOverrides,
    world: World,
) -> dict[str, Any]:
    """What results.json says about a test beside its figures, plain JSON. All processes have to agree on it."""
    record = {
        "task": task,
        "model": str(model_path),
        "model_sha256": sha256(model_file(model_path)),
        "provenance": card.provenance,
        "data": str(data),
        "split": split,
        "data_fingerprint": fingerprint,
        "classes_sha256": class_list_hash(classes),
        "protocol_numbers": dict(protocol_numbers),
        **record_machine(settings, world),
    }
    require_agreement(world, {key: record[key] for key in _Earlier.model_fields})
    return record


def own_folder(out: Path, world: World) -> AbstractContextManager[None]:
    """The folder of a test, for this test alone."""
    return exclusive_folder(out, world, f"{out}: another test is writing here; wait for it or choose another --out")


def refuse_other_test(path: Path, record: Mapping[str, Any]) -> None:
    """Raise UsageError if `path`, a results.json, is that of a test of something else."""
    if not path.is_file():
        return
    earlier = read_record(path, _Earlier, "choose another --out, or remove the file")
    differing = [key for key, value in earlier.model_dump().items() if record[key] != value]
    if differing:
        raise UsageError(
            f"{path}: holds the result of another test, of different {', '.join(differing)}; choose another --out, or "
            "remove the folder if you no longer need that result"
        )


def own_images(count: int, world: World) -> Iterator[int]:
    """The numbers of the images of this process: rank r of R takes r, r + R, ... Rank 0 shows its progress."""
    numbers = range(world.rank, count, world.size)
    with Progress("test", len(numbers), unit="images", shown=world.rank == 0) as progress:
        for number in numbers:
            yield number
            progress.advance(1)


def write_sheet(rows: Sequence[Tensor], path: Path) -> None:
    """Write pictures, uint8 (3, h, w), below each other as a PNG, white at the right of narrower ones."""
    width = max(row.shape[2] for row in rows)
    sheet = torch.cat([TF.pad(row, [0, 0, width - row.shape[2], 0], fill=255) for row in rows], dim=1)
    with atomic_write(path) as part:
        Image.fromarray(sheet.permute(1, 2, 0).numpy()).save(part, format="PNG")
