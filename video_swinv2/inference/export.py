"""Export of a model file to torch.export (`.pt2`) or ONNX, for use without this package.

An exported program accepts any batch size and contains the class names and the preprocessing. It is kept only if its
outputs agree with those of the model. A detector, which differs in all of this but the last, is `detector_export.py`'s.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from video_swinv2.data.media import IMAGE, VIDEO
from video_swinv2.data.transforms import normalise
from video_swinv2.dense.detectors import Detector
from video_swinv2.dense.loading import load_model as load_dense_model
from video_swinv2.dense.segmenters import Segmenter
from video_swinv2.errors import UsageError, UserError
from video_swinv2.evaluation.protocols import PROTOCOLS
from video_swinv2.evaluation.views import view_shape
from video_swinv2.files import atomic_write, json_text
from video_swinv2.inference.detector_export import MIN_SHARE_FOUND, compare_detections, write_onnx
from video_swinv2.inference.media_types import find_media_files, read_file_views
from video_swinv2.models.swinv2 import IntOrPerAxis, SwinV2, per_axis
from video_swinv2.weights.store import CARD_KEY, ModelCard, Preprocessing, load_model, read_card, require_rgb

OPSET = 23  # the first opset with an operator for scaled dot-product attention
OPSETS = range(18, OPSET + 1)
MAX_LOGIT_DIFFERENCE = 1e-4  # for comparison, a different summation order changes logits by about 1e-6
MAX_ONNX_BYTES = 2**31  # protobuf's limit for one file
SAMPLES = 3  # views compared per file, or samples of noise
TOP = 5
_PACKAGES = ("onnx", "onnxscript", "onnxruntime")

Program = Callable[[Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """How closely the outputs of an exported program agree with those of its model on `samples` samples.

    difference: the largest absolute difference between two logits. same: the number of samples for which the top five
    classes are the same, in the same order, or of a segmenter the first class of every pixel. Of a detector, samples
    are detections, `same` those that both find, and the difference is that of `compare_detections`.
    """

    difference: float
    samples: int
    same: int
    of: str = "logits"
    """What was compared: logits or detections."""

    def __str__(self) -> str:
        if self.of == "detections":
            return (
                f"{self.same} of {self.samples} detections are the model's, and differ by at most "
                f"{self.difference:.1e} in their scores and in parts of the image"
            )
        return (
            f"the logits differ from the model's by at most {self.difference:.1e}, and {self.same} of {self.samples} "
            "samples have the same top five classes"
        )


def export(
    model_path: Path | str,
    out: Path | str,
    *,
    frames: int | None = None,
    image_size: IntOrPerAxis | None = None,
    window: IntOrPerAxis | None = None,
    opset: int | None = None,
    check: Sequence[Path | str] = (),
    report: Callable[[str], None] = lambda step: None,
) -> Comparison:
    """Export a model file to `out`, `*.pt2` or `*.onnx`, and compare the outputs of both.

    frames, image_size, window: sizes to export at, by default those of the file. check: videos to compare on, as files
    or folders; for an image model, images or single video files. By default the comparison uses random noise. report:
    called with each step as it begins. Raises UsageError for a wrong name or option, and UserError for a model that
    cannot be exported (no RGB input, no logits, a detector as .pt2) or whose exported program differs from it by more
    than MAX_LOGIT_DIFFERENCE. A failed export leaves no file behind.
    """
    model_path, out = Path(model_path), Path(out)
    _check_request(out, opset)
    file_card = read_card(model_path)
    require_rgb(file_card.architecture, model_path)
    if file_card.dense.get("task") == "detection":
        return _export_detector(model_path, file_card, out, frames, image_size, window, opset, check, report)
    if file_card.architecture.get("features_only") and not file_card.dense:
        raise UserError(f"{model_path}: a features_only model returns feature maps and no logits; export a classifier")
    # With sdpa, the attention of a block is exported as one operator, which ONNX has, too, from opset 23 on.
    model, card = _load(model_path, file_card, frames, image_size, window)
    samples = _comparison_inputs(card.preprocessing, [Path(path) for path in check])
    # The first batch serves as the example input of the export, too.
    inputs = next(samples)
    size = _weight_bytes(model, out)
    with atomic_write(out) as part:
        with torch.no_grad(), _without_exporter_notes():
            # Only the batch axis is dynamic. The grid decides windows and masks, which become constants of the program.
            report(f"tracing the model, {size / 1e6:.0f} MB of weights")
            exported = torch.export.export(model, (inputs,), dynamic_shapes=({0: Dim.DYNAMIC},))
            report(f"writing {out.name}")
            description = json_text(_description(card))
            if out.suffix == ".onnx":
                program = _write_onnx(exported, part, description, opset or OPSET)
            else:
                program = _write_pt2(exported, part, description)
        # Compared on one sample first, then on several, which shows that the export has not fixed the batch size.
        report("comparing the program with the model")
        comparison = _compare(model, program, chain([inputs[:1], inputs], samples))
        # On an error, `atomic_write` deletes the partial file, and an earlier file of this name stays.
        if not comparison.difference <= MAX_LOGIT_DIFFERENCE:
            raise UserError(
                f"{out}: differs from the model by {comparison.difference:.1e}, above {MAX_LOGIT_DIFFERENCE:.0e}, and "
                "was not kept; try the other format, and please report it with the versions of torch and onnxruntime"
            )
    return comparison


def _export_detector(
    model_path: Path,
    card: ModelCard,
    out: Path,
    frames: int | None,
    image_size: IntOrPerAxis | None,
    window: IntOrPerAxis | None,
    opset: int | None,
    check: Sequence[Path | str],
    report: Callable[[str], None],
) -> Comparison:
    if out.suffix != ".onnx":
        raise UsageError(f"{out}: torch.export cannot express a detector, whose output has no fixed size; use .onnx")
    detector: Detector = load_dense_model(model_path, frames=frames, window=window, attention="sdpa")
    sides = (detector.design.short_side, detector.design.max_side) if image_size is None else image_size
    height, width = per_axis("image_size", sides, 2)
    card = dataclasses.replace(card, preprocessing=dataclasses.replace(card.preprocessing, image_size=(height, width)))
    with atomic_write(out) as part:
        with torch.no_grad(), _without_exporter_notes():
            size = _weight_bytes(detector, out)
            report(f"tracing the model at {height} x {width} pixels, {size / 1e6:.0f} MB of weights")
            run = write_onnx(detector, card, part, opset)
        report("comparing the program with the model")
        found = compare_detections(detector, run, (height, width), [Path(path) for path in check])
        comparison = Comparison(*found, "detections")
        if comparison.same < MIN_SHARE_FOUND * comparison.samples:
            raise UserError(
                f"{out}: {comparison.samples - comparison.same} of {comparison.samples} detections differ from the "
                "model's, and it was not kept; please report it with the versions of torch and onnxruntime"
            )
    return comparison


def _weight_bytes(model: nn.Module, out: Path) -> int:
    """Bytes of the weights. Raises UserError for an ONNX file that would have too many."""
    size = sum(parameter.nbytes for parameter in model.parameters())
    if out.suffix == ".onnx" and size >= MAX_ONNX_BYTES:
        raise UserError(f"{out}: an ONNX file is limited to 2 GB, and the weights have {size / 1e9:.1f} GB; use .pt2")
    return size


def _check_request(out: Path, opset: int | None) -> None:
    if out.suffix not in (".pt2", ".onnx"):
        raise UsageError(f"{out}: the name must end in .pt2 (torch.export) or .onnx")
    if opset is not None and (out.suffix != ".onnx" or opset not in OPSETS):
        raise UsageError(f"--opset {opset}: must be from {OPSETS[0]} to {OPSETS[-1]}, and applies to .onnx only")
    if not out.parent.is_dir():
        raise UsageError(f"{out}: the folder {out.parent} does not exist; create it first")
    # `find_spec` looks a package up without importing it.
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if out.suffix == ".onnx" and missing:
        raise UserError(f"{out}: {', '.join(missing)} not installed; pip install 'video-swinv2[export]'")


def _load(
    path: Path, card: ModelCard, frames: int | None, image_size: IntOrPerAxis | None, window: IntOrPerAxis | None
) -> tuple[SwinV2 | Segmenter, ModelCard]:
    """A classifier or a segmenter, and the card of the file with its sizes replaced by those to export at."""
    if card.dense.get("task") == "segmentation":
        # A segmenter takes images of any size. The exported program is for one, by default that of the training crops.
        segmenter: Segmenter = load_dense_model(path, frames=frames, window=window, attention="sdpa")
        encoder, size = segmenter.encoder, card.preprocessing.image_size if image_size is None else image_size
        height, width = per_axis("image_size", size, 2)
        model: SwinV2 | Segmenter = segmenter
    else:
        model = encoder = load_model(path, frames=frames, image_size=image_size, window=window, attention="sdpa")
        height, width = encoder.image_size
    preprocessing = dataclasses.replace(card.preprocessing, frames=encoder.frames, image_size=(height, width))
    return model, dataclasses.replace(card, preprocessing=preprocessing, architecture=encoder.architecture())


def _description(card: ModelCard) -> dict[str, object]:
    """Everything that a user of the exported file needs to know; it is stored in the file as JSON."""
    axes = "batch, 3, H, W" if card.preprocessing.frames is None else "batch, 3, T, H, W"
    return {
        "input": f"pixels ({axes}) float32: RGB from 0 to 1, less mean, over std, both per channel",
        "output": f"logits (batch, classes{', H, W' if card.dense else ''}) float32",
        "classes": list(card.classes),
        "preprocessing": dataclasses.asdict(card.preprocessing),
        "architecture": card.architecture,
        "provenance": card.provenance,
    }


def _comparison_inputs(preprocessing: Preprocessing, check: Sequence[Path]) -> Iterator[Tensor]:
    """Normalised views of each file in `check`, or noise if it is empty: float32 (2 to SAMPLES, 3, [T,] H, W).

    There must be at least two: from an example of one sample, torch.export would fix the batch size at 1.
    """
    protocol, missing = PROTOCOLS["videoswin-4x3"], [path for path in check if not path.exists()]
    if missing:
        raise UsageError(f"{missing[0]}: no such file")
    wanted = IMAGE if preprocessing.frames is None else VIDEO
    for path, media_type in find_media_files(check, wanted):
        if (media_type, wanted) == (IMAGE, VIDEO):
            raise UsageError(f"{path}: an image, but this model takes videos; name videos with --check")
        pixels = read_file_views(path, protocol, preprocessing)
        yield normalise(pixels[:SAMPLES], preprocessing.mean, preprocessing.std)
    if not check:
        noise = torch.randint(0, 256, (SAMPLES, *view_shape(preprocessing)), dtype=torch.uint8)
        yield normalise(noise, preprocessing.mean, preprocessing.std)


def _write_pt2(exported: ExportedProgram, part: Path, description: str) -> Program:
    """Write the program to `part` and load it again, so that the comparison covers the file itself."""
    # torch.export wants a name that ends in .pt2, which a partial file does not have. Open files have no such rule.
    with part.open("wb") as file:
        torch.export.save(exported, file, extra_files={f"{CARD_KEY}.json": description})
    with part.open("rb") as file:
        return torch.export.load(file).module()


def _write_onnx(exported: ExportedProgram, part: Path, description: str, opset: int) -> Program:
    """Write the program to `part` and open it with ONNX Runtime on the CPU. Requires the packages of `_PACKAGES`."""
    import onnxruntime

    # `dynamo=True` converts the exported program; the older exporter would trace the model. The shapes of the program
    # are fixed by now, and dynamic_shapes only gives its free axis a name.
    program = torch.onnx.export(
        exported,
        dynamo=True,
        opset_version=opset,
        input_names=["pixels"],
        output_names=["logits"],
        dynamic_shapes=({0: "batch"},),
        verbose=False,
    )
    if program is None:
        raise UserError(f"{part}: torch.onnx.export returned no program; use .pt2")
    # ONNX's own map of strings, which ONNX Runtime returns as `custom_metadata_map`.
    program.model.metadata_props[CARD_KEY] = description
    program.save(part)
    session = onnxruntime.InferenceSession(part, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {"pixels": x.numpy()})[0])


def _compare(model: SwinV2 | Segmenter, program: Program, batches: Iterable[Tensor]) -> Comparison:
    """Run model and program on the same batches, which should differ in size. NaN counts as an infinite difference."""
    worst, samples, same = 0.0, 0, 0
    for batch in batches:
        with torch.no_grad():
            ours, theirs = model(batch), program(batch)
        worst = max(worst, torch.nan_to_num((theirs - ours).abs(), nan=torch.inf).max().item())
        # Each sample counts if all of its top classes agree, in order; of a segmenter, the first one of every pixel.
        top = min(TOP, ours.shape[1]) if ours.ndim == 2 else 1
        same_order = ours.topk(top, dim=1).indices == theirs.topk(top, dim=1).indices
        agreeing = same_order.flatten(1).all(dim=1)
        samples, same = samples + len(batch), same + int(agreeing.sum())
    return Comparison(worst, samples, same)


@contextmanager
def _without_exporter_notes() -> Iterator[None]:
    """Silence warnings and log messages of the exporters about their own internals. Errors still come through."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        log.setLevel(logging.ERROR)
        try:
            yield
        finally:
            log.setLevel(level)
