"""`make proof`: what is claimed of the model, measured beside its limit; exit code 1 if a limit is passed."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version

import torch

from tests.models.costs import CLIP_MACS, COUNTS, IMAGE_MACS, Setting, beyond_rounding, giga_macs, parameters
from tests.models.equivalence import (
    GRADIENT_KINDS,
    STILL,
    Still,
    answers,
    can_differentiate,
    image_model,
    inflated,
    order_difference,
    padding_attended,
    perturb_time,
    still_difference,
    worst,
)
from tests.models.parity import KINDS, PAIRS, differences, ours
from tests.models.reference import GRIDS, reference_differences
from video_swinv2.models.variants import VARIANTS

LIMIT = 1e-5  # fp32, the issue's
LIMIT_FP64 = 1e-6  # all keep log coordinates in fp32 and round them in different orders, 1e-7 apart
GRADIENT_LIMIT = 1e-4
MACS_LIMIT = 1e-3
TEETH = 1e-2  # a mistake must show at least this much, or the check beside it would prove nothing


@dataclass
class Table:
    """Rows of text under a title, and how many of them are past their limit."""

    title: str
    meaning: str
    header: tuple[str, ...]
    rows: list[tuple[str, ...]] = field(default_factory=list)
    checks: int = 0
    failures: int = 0

    def add(self, *cells: str, holds: bool) -> None:
        """One row; it says itself when it does not hold."""
        self.rows.append((*cells, "" if holds else "PAST THE LIMIT"))
        self.checks += 1
        self.failures += not holds

    def remark(self, *cells: str) -> None:
        """A row that checks nothing; its last cell may run over the columns."""
        self.rows.append(cells)

    def __str__(self) -> str:
        header = (*self.header, "")
        full = [row for row in (header, *self.rows) if len(row) == len(header)]
        widths = [max(len(row[i]) for row in full) for i in range(len(header))]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=False)) for row in (header, *self.rows)]
        lines.insert(1, "-" * (sum(widths) + 2 * len(widths) - 4))
        return "\n".join([f"## {self.title}", self.meaning, "", *(f"    {line.rstrip()}" for line in lines), ""])


def libraries() -> Table:
    """The image model beside three independent implementations."""
    table = Table(
        "The same weights in timm, Hugging Face and torchvision",
        "swinv2_tiny, random weights, fp32: largest difference of the logits, and of each stage's features in units\n"
        f"of their deviation. Limit {LIMIT:.0e}. Last column: nano in fp64, all outputs, limit {LIMIT_FP64:.0e}.",
        ("image, window", "beside", "logits", "stage 1", "stage 2", "stage 3", "stage 4", "in fp64"),
    )
    for case, library in PAIRS:
        figures = differences(ours("swinv2_tiny", case, "auto"), case, library)
        exact = max(differences(ours("swinv2_nano", case).double(), case, library))
        cells = [f"{figure:.1e}" for figure in (*figures, exact)]
        table.add(str(case), library, *cells, holds=max(figures) <= LIMIT and exact <= LIMIT_FP64)
    return table


def definition() -> Table:
    """The clip model beside attention by integer coordinates, one query at a time."""
    table = Table(
        "Attention from its definition",
        "The reference looks every query's keys up by coordinates, in fp64: no windows cut, no masks, no tables.\n"
        f"One stage of two blocks, the second one shifted: largest difference of the features. Limit {LIMIT:.0e}.",
        ("grid", "window", "normaliser", *KINDS),
    )
    for case in GRIDS:
        figures = reference_differences(case, KINDS)
        names = (" x ".join(map(str, sizes)) for sizes in (case.grid, case.window, case.norm or case.window))
        table.add(*names, *(f"{figure:.1e}" for figure in figures), holds=max(figures) <= LIMIT)
    return table


def backends() -> Table:
    """Every backend's gradients beside eager's."""
    table = Table(
        "Attention backends beside eager: gradients",
        "Clip model, windows (2, 4, 4), padding and shifts in every axis: largest difference in units of the tensor's\n"
        f"largest gradient. Limit {GRADIENT_LIMIT:.0e}.",
        ("backend", "logits", *GRADIENT_KINDS),
    )
    expected = answers("eager", 5, (70, 57))
    for kind in KINDS:
        if not can_differentiate(kind):
            table.remark(kind, "torch has no gradients of it on CPUs; its outputs are in the table above")
        elif kind != "eager":
            got = answers(kind, 5, (70, 57))
            figures = [worst(expected, got, name) for name in ("logits", *GRADIENT_KINDS)]
            table.add(kind, *(f"{figure:.1e}" for figure in figures), holds=max(figures) <= GRADIENT_LIMIT)
    return table


def still_clips() -> Table:
    """One frame repeated, after inflation, beside the image model."""
    table = Table(
        "A still clip equals its image after inflation, whatever its length",
        f"Largest difference, fp32. Limit {LIMIT:.0e}. Last columns: the error of a model that attends to padding, as "
        f"Video Swin does;\nit must be seen (over {TEETH:.0e}), or this check could not find it.",
        ("model", "window", "frames", "patch", "tokens", "logits", "features", "padding attended: logits", "features"),
    )
    small, tiny = image_model(), image_model("swinv2_tiny", 224, 7)
    full = [(tiny, Still(8, 16, 2)), (tiny, Still(8, 20, 2))]
    for image, case in [*((small, case) for case in STILL), *full]:
        figures, careless = still_difference(image, case), None
        if case.is_padded:
            with padding_attended():
                careless = still_difference(image, case)
        name = f"{image.name.removeprefix('swinv2_')} {image.image_size[0]}x{image.image_size[1]}"
        numbers = (str(n) for n in (case.window, case.frames, case.patch, case.tokens))
        cells = [f"{figure:.1e}" for figure in (*figures, *(careless or ()))] + ["no padding", ""] * (careless is None)
        holds = max(figures) <= LIMIT and (careless is None or min(careless) >= TEETH)
        table.add(name, *numbers, *cells, holds=holds)
    return table


def order_in_time() -> Table:
    """Frames in another order: free at inflation inside one window, seen by everything else."""
    table = Table(
        "The order of frames after inflation (patches of one frame)",
        "Largest difference of the logits between a random clip and its frames shuffled: none while one window holds\n"
        f"all frames and the bias ignores time (limit {LIMIT:.0e}); seen in all other cases (over {TEETH:.0e}).",
        ("window", "frames", "column for time", "difference", "must be"),
    )
    for window, frames in ((8, 8), (8, 5), (4, 8), (4, 7)):
        clip = inflated(image_model(), frames, window, 1)
        for state in ("zero, as inflated", "perturbed"):
            free = frames <= window and state != "perturbed"
            figure = order_difference(clip if state != "perturbed" else perturb_time(clip), frames)
            holds = figure <= LIMIT if free else figure >= TEETH
            table.add(str(window), str(frames), state, f"{figure:.1e}", "none" if free else "seen", holds=holds)
    return table


def counts() -> Table:
    """Parameters of every size."""
    table = Table(
        "Parameters, images and clips",
        "Beside the specification's, which are those of the official code, timm and Hugging Face; to the unit.",
        ("model", "classes", "frames in a patch", "extra norms", "counted", "specified"),
    )
    for count in COUNTS:
        got = parameters(count)
        kind = "image" if count.patch_time is None else str(count.patch_time)
        has_extra = VARIANTS[count.name].extra_norm_every > 0
        extra = ("counted" if count.extra else "left out") if has_extra else ""
        figures = (f"{got:,}", f"{count.parameters:,}")
        table.add(count.name, str(count.classes), kind, extra, *figures, holds=got == count.parameters)
    return table


def macs() -> Table:
    """Multiply-accumulates of every size and setting of the specification."""
    table = Table(
        "Giga multiply-accumulates of one view",
        "Counted from the shapes of every product and convolution; specified in brackets.\n"
        f"Limit {MACS_LIMIT:.1%} beyond the rounding of the printed figure.",
        ("frames", "pixels", "window", "tiny", "small", "base", "large", "giant", "off by"),
    )

    def add(setting: Setting, specified: dict[str, str]) -> None:
        got = {size: giga_macs(size, setting) for size in specified}
        cells = [f"{got[s]:.2f} ({float(specified[s]):g})" if s in got else "" for s in table.header[3:8]]
        off = max(beyond_rounding(got[size], specified[size]) for size in specified)
        frames, pixels, window = setting
        sizes = ("image" if frames is None else str(frames), f"{pixels}x{pixels}", ",".join(map(str, window)))
        table.add(*sizes, *cells, f"{off:.3%}", holds=off <= MACS_LIMIT)

    for setting, specified in (*IMAGE_MACS, *CLIP_MACS):
        add(setting, specified)
    return table


TABLES: tuple[Callable[[], Table], ...] = (
    libraries, definition, backends, still_clips, order_in_time, counts, macs
)  # fmt: skip


def main() -> int:
    """Print every table; 0 if all rows hold."""
    warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "timm", "transformers", "torchvision"))
    print(f"Proof of the model: {packages}; CPU, random weights, nothing downloaded.\n", flush=True)
    checks = failures = 0
    for make in TABLES:
        torch.manual_seed(0)
        table = make()
        print(table, flush=True)
        checks, failures = checks + table.checks, failures + table.failures
    print(f"{checks - failures} of {checks} rows hold; {time.process_time():.0f} CPU seconds.")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
