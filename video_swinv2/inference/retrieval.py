"""Search by example: feature vectors of files, saved as a gallery, and the nearest files in it to a query.

This needs neither class names nor a trained classifier, only a backbone.

Letters: N files, C channels.
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
from video_swinv2.data.media import IMAGE, VIDEO
from video_swinv2.distributed.world import World
from video_swinv2.errors import UsageError, UserError
from video_swinv2.evaluation.features import Backbone, extract_features, open_backbone
from video_swinv2.evaluation.overrides import Device, TestOverrides
from video_swinv2.evaluation.probe import TEMPERATURE
from video_swinv2.evaluation.protocols import Protocol, find_protocol, protocol_for_images
from video_swinv2.inference.classifier import Answer
from video_swinv2.inference.predictor import STREAM, find_sources, unreadable_reason
from video_swinv2.report.scores import read_arrays, require_rows, write_arrays


@dataclass(frozen=True)
class Gallery:
    """The feature vectors of N files.

    names: paths as they were given or found. labels: empty for a file without one. vectors: (N, C) float32, zero for
    files that could not be read. reasons: why a file could not be read; empty for the others. record: how the vectors
    were made, as JSON. Only vectors with equal records can be compared.
    """

    names: tuple[str, ...]
    labels: tuple[str, ...]
    vectors: NDArray[np.float32]
    reasons: tuple[str, ...]
    record: str


@dataclass(frozen=True)
class Neighbour:
    """A file of the gallery, its label, and the cosine similarity (-1 to 1) of its vector and that of the query."""

    path: str
    label: str
    similarity: float


@dataclass(frozen=True)
class SearchResult:
    """The files of a gallery nearest to one query, nearest first, and the vote of their labels.

    If the query could not be read, both are empty and `error` gives the reason.
    """

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
    world: World | None = None,
) -> Gallery:
    """Compute the feature vectors of files, and of the videos (for an image model: images) in folders.

    The model is a checkpoint in any supported layout. The label of a file is the name of the first subfolder on the
    path from a given folder to the file; files that are given by name or lie directly in the folder have none. The
    processes of `world` share the work, and all return the whole gallery. Raises UsageError for a stream and for a
    folder without a suitable file, and UserError if no file can be read.
    """
    chosen_protocol = find_protocol(protocol)
    overrides = TestOverrides(
        device=device, batch_views=batch_views, workers=workers, time_limit_seconds=time_limit_seconds
    )
    backbone = open_backbone(Path(model_path), overrides)
    wanted = VIDEO if backbone.preprocessing.frames is not None else IMAGE
    names, labels, media_types = _find_labelled_files(sources, wanted)
    reasons = [
        unreadable_reason(Path(name), media_type, wanted) for name, media_type in zip(names, media_types, strict=True)
    ]
    vectors = np.zeros((len(names), backbone.model.num_features), np.float32)
    # Videos and images are read in different views, so each type is extracted in one pass over its files.
    for media_type, views in ((VIDEO, chosen_protocol), (IMAGE, protocol_for_images(chosen_protocol))):
        positions = [i for i, reason in enumerate(reasons) if not reason and media_types[i] == media_type]
        if positions:
            some_vectors, some_reasons = _extract(backbone, [names[i] for i in positions], views, overrides, world)
            vectors[positions] = some_vectors
            for i, reason in zip(positions, some_reasons, strict=True):
                # The name is stored beside the reason and need not be repeated in it.
                reasons[i] = reason.removeprefix(f"{names[i]}: ")
    if all(reasons):
        raise UserError(f"{names[0]}: {reasons[0]}; none of {len(names)} files could be read")
    record = {
        # The path of the weights is left out, because it does not change the vectors.
        "backbone": {key: value for key, value in backbone.record.items() if key != "path"},
        "preprocessing": asdict(backbone.preprocessing),
        "protocol": protocol,
    }
    return Gallery(
        tuple(names), tuple(labels), vectors, tuple(reasons), json.dumps(record, sort_keys=True, allow_nan=False)
    )


def save_gallery(gallery: Gallery, path: Path) -> None:
    """Write a gallery to an `.npz` file. Raises UsageError for another suffix, UserError if it cannot be written."""
    if path.suffix != ".npz":
        raise UsageError(f"{path}: the name must end in .npz")
    # Arrays of strings and not of objects, which NumPy would have to pickle.
    texts = {key: np.array(getattr(gallery, key), dtype=np.str_) for key in ("names", "labels", "reasons", "record")}
    write_arrays(path, {**texts, "vectors": gallery.vectors})


def load_gallery(path: Path) -> Gallery:
    """Read what `save_gallery` wrote. Raises UserError for any other file."""
    fix = "make it with `predict --features`"
    arrays = read_arrays(path, fix)
    texts = {"names": ("U", 1), "labels": ("U", 1), "reasons": ("U", 1), "record": ("U", 0)}
    require_rows(arrays, texts | {"vectors": ("f", 2)}, str(path), fix)
    names, labels, reasons = (tuple(arrays[key].tolist()) for key in ("names", "labels", "reasons"))
    if all(reasons):
        raise UserError(f"{path}: none of its {len(names)} files could be read; {fix}")
    return Gallery(names, labels, arrays["vectors"], reasons, str(arrays["record"]))


def search(gallery: Gallery, queries: Gallery, k: int) -> list[SearchResult]:
    """Find the k files of a gallery that are nearest to each query by cosine similarity, and let their labels vote.

    A gallery with fewer than k readable files gives all of them. Raises UsageError for k below 1, and unless the
    gallery and the queries were made with the same model, sizes and protocol.
    """
    if k < 1:
        raise UsageError(f"--k {k}: must be at least 1")
    if gallery.record != queries.record or gallery.vectors.shape[1] != queries.vectors.shape[1]:
        raise UsageError(
            "the gallery was made with another model, other sizes or another protocol; make it again with the same ones"
        )
    readable = [i for i, reason in enumerate(gallery.reasons) if not reason]
    tree = NearestNeighbors(n_neighbors=min(k, len(readable)), metric="cosine").fit(gallery.vectors[readable])
    # Both are (queries, k), nearest first. Positions are indices into `readable`. Unreadable queries have zero vectors,
    # whose neighbours mean nothing; they are passed over below.
    distances, positions = tree.kneighbors(queries.vectors)
    results = []
    for i, name in enumerate(queries.names):
        if queries.reasons[i]:
            results.append(SearchResult(name, (), (), queries.reasons[i]))
            continue
        nearest = tuple(
            # scikit-learn's cosine distance is 1 minus the cosine similarity.
            Neighbour(gallery.names[readable[position]], gallery.labels[readable[position]], 1.0 - float(distance))
            for position, distance in zip(positions[i], distances[i], strict=True)
        )
        results.append(SearchResult(name, nearest, _vote(nearest)))
    return results


def _find_labelled_files(sources: Sequence[Path | str], wanted: str) -> tuple[list[str], list[str], list[str | None]]:
    """The names, labels and media types of all files in `sources`. Raises UsageError for a stream."""
    names, labels, media_types = [], [], []
    for source in map(str, sources):
        for name, media_type in find_sources([source], wanted):
            if media_type == STREAM:
                raise UsageError(f"{name}: is a stream; features can be computed for files only")
            # For root/class/a/b.mp4 found in the folder root, the parts are (class, a, b.mp4).
            inside = Path(name).relative_to(source).parts if Path(source).is_dir() else ()
            names.append(name)
            labels.append(inside[0] if len(inside) > 1 else "")
            media_types.append(media_type)
    return names, labels, media_types


def _extract(
    backbone: Backbone, names: Sequence[str], protocol: Protocol, overrides: TestOverrides, world: World | None
) -> tuple[NDArray[np.float32], tuple[str, ...]]:
    """The vectors (n, C) of n files, and the reason for each one that could not be read (otherwise empty)."""
    # A manifest in memory, which the feature extraction of tests can read. The label -1 is not used.
    entries = [Entry(name, str(Path(name).absolute()), -1) for name in names]
    manifest = Manifest(Path(), "files", (), entries, fingerprint="")
    features = extract_features(backbone, manifest, protocol, overrides, None, world)
    return features.vectors, features.reasons


def _vote(neighbours: Sequence[Neighbour]) -> tuple[Answer, ...]:
    """The share of each label in the votes of the neighbours, largest first; empty if no neighbour has a label.

    A neighbour votes with weight exp(cosine / temperature), as in `probe`. Subtracting 1 from the cosine does not
    change the shares and prevents the exponential from overflowing.
    """
    votes: dict[str, float] = {}
    for neighbour in neighbours:
        if neighbour.label:
            weight = float(np.exp((neighbour.similarity - 1.0) / TEMPERATURE))
            votes[neighbour.label] = votes.get(neighbour.label, 0.0) + weight
    total = sum(votes.values())
    ranked = sorted(votes.items(), key=lambda item: -item[1])
    return tuple(Answer(label, vote / total) for label, vote in ranked)
