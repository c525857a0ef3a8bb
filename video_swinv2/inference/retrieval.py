"""Finding videos like others by frozen features: vectors of files, kept as a gallery, and its nearest ones to a query.

Needs no class and no training, so it serves fields that no head was made for. N files, C channels.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from sklearn.neighbors import NearestNeighbors

from video_swinv2.data.manifest import Entry, Manifest
from video_swinv2.errors import UsageError, UserError
from video_swinv2.evaluation.features import Backbone, extract_features, open_backbone
from video_swinv2.evaluation.overrides import Device, TestOverrides
from video_swinv2.evaluation.probe import TEMPERATURE
from video_swinv2.evaluation.protocols import Protocol, find_protocol, protocol_for_images
from video_swinv2.inference.classifier import Answer
from video_swinv2.inference.media_types import IMAGE, VIDEO
from video_swinv2.inference.predictor import STREAM, find_sources
from video_swinv2.report.scores import read_arrays, write_arrays


@dataclass(frozen=True)
class Gallery:
    """names as found; labels, '' where there is none; vectors (N, C), zeros where `reasons` says why there is none.

    Equal `record`s, plain JSON, make vectors that can be compared.
    """

    names: tuple[str, ...]
    labels: tuple[str, ...]
    vectors: NDArray[np.float32]
    reasons: tuple[str, ...]
    record: str


@dataclass(frozen=True)
class Neighbour:
    """A file of a gallery, its label, and the cosine between its vector and the query's."""

    path: str
    label: str
    likeness: float


@dataclass(frozen=True)
class SearchResult:
    """The files most like one, the likest first, and the shares of their labels in a vote; or why there is nothing."""

    path: str
    neighbours: tuple[Neighbour, ...]
    answers: tuple[Answer, ...]
    error: str = ""


def make_gallery(
    model_path: Path | str,
    sources: Sequence[Path | str],
    *,
    protocol: str = "center-1x1",
    device: Device = "auto",
    batch_views: int = 12,
    workers: int | None = None,
    time_limit_seconds: float = 60.0,
) -> Gallery:
    """The vectors of files and of all videos (for an image model: images) in folders, by any known checkpoint.

    In a folder of folders, the first of them on the way to a file is its label. Raises UsageError for a stream and for
    a folder that holds no such file, UserError where nothing could be read.
    """
    chosen = find_protocol(protocol)
    overrides = TestOverrides(
        device=device, batch_views=batch_views, workers=workers, time_limit_seconds=time_limit_seconds
    )
    backbone = open_backbone(Path(model_path), overrides)
    wanted = VIDEO if backbone.preprocessing.frames is not None else IMAGE
    names, labels, kinds = [], [], []
    for source in map(str, sources):
        for name, kind in find_sources([source], wanted):
            if kind == STREAM:
                raise UsageError(f"{name}: is a stream; features are made of files")
            inside = Path(name).relative_to(source).parts if Path(source).is_dir() else ()
            names.append(name)
            labels.append(inside[0] if len(inside) > 1 else "")
            kinds.append(kind)
    reasons = [_reason(name, kind, wanted) for name, kind in zip(names, kinds, strict=True)]
    vectors = np.zeros((len(names), backbone.model.num_features), np.float32)
    for kind, views in ((VIDEO, chosen), (IMAGE, protocol_for_images(chosen))):
        places = [i for i, reason in enumerate(reasons) if not reason and kinds[i] == kind]
        if places:
            made, why = _features(backbone, [names[i] for i in places], views, overrides)
            vectors[places] = made
            for i, reason in zip(places, why, strict=True):
                reasons[i] = reason.removeprefix(f"{names[i]}: ")
    if all(reasons):
        raise UserError(f"{names[0]}: {reasons[0]}; of {len(names)} files none could be read")
    record = {
        "backbone": {key: value for key, value in backbone.record.items() if key != "path"},
        "preprocessing": asdict(backbone.preprocessing),
        "protocol": protocol,
    }
    return Gallery(tuple(names), tuple(labels), vectors, tuple(reasons), json.dumps(record, sort_keys=True))


def save_gallery(gallery: Gallery, path: Path) -> None:
    """Write an `.npz` file; UserError where that cannot be done."""
    if path.suffix != ".npz":
        raise UsageError(f"{path}: give a name that ends in .npz")
    texts = {key: np.array(getattr(gallery, key), dtype=np.str_) for key in ("names", "labels", "reasons", "record")}
    write_arrays(path, {**texts, "vectors": gallery.vectors})


def load_gallery(path: Path) -> Gallery:
    """The gallery of a file; UserError if it is none."""
    arrays = read_arrays(path, "make it with `predict --features`")
    try:
        names, labels, reasons = (tuple(arrays[key].tolist()) for key in ("names", "labels", "reasons"))
        return Gallery(names, labels, arrays["vectors"], reasons, str(arrays["record"]))
    except KeyError as error:
        raise UserError(f"{path}: holds no {error}; make it with `predict --features`") from error


def search(gallery: Gallery, queries: Gallery, k: int) -> list[SearchResult]:
    """The k files of a gallery nearest to each of the queries by cosine, and the vote of their labels.

    A neighbour's vote weighs exp(cosine / temperature), as in `probe`. Raises UsageError where the two were not made by
    one model with one protocol.
    """
    if k < 1:
        raise UsageError(f"--k {k}: give 1 or more")
    if gallery.record != queries.record:
        raise UsageError("the gallery was made with another model, sizes or protocol; make it again with these")
    read = [i for i, reason in enumerate(gallery.reasons) if not reason]
    tree = NearestNeighbors(n_neighbors=min(k, len(read)), metric="cosine").fit(gallery.vectors[read])
    distances, places = tree.kneighbors(queries.vectors)
    found = []
    for i, name in enumerate(queries.names):
        if queries.reasons[i]:
            found.append(SearchResult(name, (), (), queries.reasons[i]))
            continue
        nearest = tuple(
            Neighbour(gallery.names[read[place]], gallery.labels[read[place]], 1.0 - float(distance))
            for place, distance in zip(places[i], distances[i], strict=True)
        )
        found.append(SearchResult(name, nearest, _vote(nearest)))
    return found


def _features(
    backbone: Backbone, names: Sequence[str], protocol: Protocol, overrides: TestOverrides
) -> tuple[NDArray[np.float32], tuple[str, ...]]:
    entries = [Entry(name, Path(name).absolute(), -1) for name in names]
    manifest = Manifest(Path(), "files", (), entries, fingerprint="")
    features = extract_features(backbone, manifest, protocol, overrides, None)
    return features.vectors, features.reasons


def _reason(name: str, kind: str | None, wanted: str) -> str:
    if not Path(name).exists():
        return "no such file"
    if kind is None:
        return "neither a video nor an image"
    return "an image, and this model takes videos" if (kind, wanted) == (IMAGE, VIDEO) else ""


def _vote(neighbours: Sequence[Neighbour]) -> tuple[Answer, ...]:
    """Shares of the labels, the largest first; none where no neighbour has a label."""
    votes: dict[str, float] = {}
    for one in neighbours:
        if one.label:
            votes[one.label] = votes.get(one.label, 0.0) + float(np.exp((one.likeness - 1.0) / TEMPERATURE))
    total = sum(votes.values())
    ranked = sorted(votes.items(), key=lambda item: -item[1])
    return tuple(Answer(label, vote / total) for label, vote in ranked)
