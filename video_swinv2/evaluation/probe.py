"""What frozen features are worth: k nearest neighbours and a linear classifier on them, through scikit-learn.

N samples, C channels, K classes.
"""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedKFold, train_test_split
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from video_swinv2.data.manifest import Manifest
from video_swinv2.errors import UsageError, UserError
from video_swinv2.evaluation.features import Backbone, Features, extract_features, open_backbone, with_random_weights
from video_swinv2.evaluation.overrides import TestOverrides
from video_swinv2.evaluation.protocols import find_protocol
from video_swinv2.evaluation.splits import available_splits, protocol_for_split, read_labelled_split
from video_swinv2.files import write_json
from video_swinv2.report.metrics import Metrics, measure, ranking

Method = Literal["knn", "linear"]
PROTOCOL = "center-1x1"
RESULT = "probe.json"
HELD_OUT = 0.2  # of each class, where a data set has one split only
TEMPERATURE = 0.07  # of the neighbours' votes, exp(cosine / temperature): arXiv 1805.01978, and DINO's k-NN
C_GRID = tuple(10.0**power for power in range(-4, 2))
FOLDS = 3
MOST_ITERATIONS = 300
MOST_NAMED = 20


@dataclass(frozen=True)
class Split:
    """Places of the training and of the test samples; `lost` of the latter failed in preparation already."""

    train: NDArray[np.int64]
    test: NDArray[np.int64]
    lost: int


@dataclass(frozen=True)
class _Data:
    """The samples of all splits used, in one list, and how a seed cuts them."""

    manifests: tuple[Manifest, ...]

    @property
    def how(self) -> str:
        if len(self.manifests) == 2:
            return f"splits {self.manifests[0].split} and {self.manifests[1].split} of the data set"
        return f"{HELD_OUT:.0%} of each class of split {self.manifests[0].split} held out, drawn by the seed"

    def split(self, labels: NDArray[np.int64], seed: int) -> Split:
        """`labels` of all samples; raises UsageError where the classes are too small to be cut."""
        sizes = [len(manifest.entries) for manifest in self.manifests]
        if len(sizes) == 2:
            return Split(np.arange(sizes[0]), sizes[0] + np.arange(sizes[1]), self.manifests[1].lost)
        (manifest,) = self.manifests
        try:
            train, test = train_test_split(np.arange(sizes[0]), test_size=HELD_OUT, stratify=labels, random_state=seed)
        except ValueError as error:
            raise UsageError(
                f"{manifest.root}: cannot be cut into training and test ({str(error).split('.')[0].lower()}); "
                "give it splits of its own"
            ) from error
        return Split(np.sort(train), np.sort(test), manifest.lost)


def run_probe(
    model_path: Path | str,
    data: Path | str,
    *,
    methods: Sequence[Method] = ("knn", "linear"),
    train_split: str | None = None,
    test_split: str | None = None,
    k: int = 20,
    seeds: int = 3,
    random_weights: bool = False,
    out: Path | None = None,
    overrides: TestOverrides | None = None,
) -> dict[str, Any]:
    """Probe the frozen features of any checkpoint; `random_weights` adds the same architecture untrained, per seed.

    Splits are by default the data set's own train and val; one that has no splits is cut anew for each seed. Seeds also
    draw the folds that choose C, and random weights. With `out` the features are kept there, and probe.json written.
    Returns what probe.json holds. Raises UsageError for labels, splits and numbers that cannot be, UserError where
    nothing could be read.
    """
    if k < 1 or seeds < 1:
        raise UsageError("k and seeds must be 1 or more")
    overrides = overrides or TestOverrides()
    backbone = open_backbone(Path(model_path), overrides)
    source = _read_data(Path(data), train_split, test_split)
    if out is not None:
        _make_folder(out)
    trained = _all_features(backbone, source, overrides, out)
    rows: list[dict[str, Any]] = []
    for seed in range(seeds):
        rows += _answers(trained, source, seed, methods, k, "given")
    for seed in range(seeds if random_weights else 0):
        fresh = _all_features(with_random_weights(backbone, seed), source, overrides, out)
        rows += _answers(fresh, source, seed, methods, k, "random")
    result = {
        "model": backbone.record,
        "preprocessing": asdict(backbone.preprocessing),
        "data": str(data),
        "data_fingerprint": {manifest.split: manifest.fingerprint for manifest in source.manifests},
        "classes": len(source.manifests[0].classes),
        "channels": trained.vectors.shape[1],
        "split": source.how,
        "k": k,
        "seeds": seeds,
        "rows": rows,
        "broken": [[name, why] for name, why in zip(trained.names, trained.reasons, strict=True) if why],
    }
    if out is not None:
        write_json(out / RESULT, result)
    return result


def show(result: dict[str, Any]) -> str:
    """The result in a few lines for people: the mean over seeds, the range, and the interval of every seed."""
    rows = result["rows"]
    learned, tested = rows[0]["train"], rows[0]["test"]["scored"]
    lines = [
        f"{result['model']['path']} ({result['model']['layout']}), {result['channels']} channels",
        f"{result['data']}: {result['classes']} classes, {learned} to learn from, {tested} tested; {result['split']}",
    ]
    for weights in dict.fromkeys(row["weights"] for row in rows):
        for method in dict.fromkeys(row["method"] for row in rows):
            lines.append(
                _line(weights, method, [row for row in rows if (row["weights"], row["method"]) == (weights, method)])
            )
    if result["broken"]:
        failed = [100 * bound for bound in rows[0]["top1_bounds"]]
        lines.append(
            f"{len(result['broken'])} files could not be read; top-1 of all listed lies between {failed[0]:.1f} and "
            f"{failed[1]:.1f} % ({rows[0]['method']}, seed 0)"
        )
        lines += [f"  {name}: {reason}" for name, reason in result["broken"][:MOST_NAMED]]
        if len(result["broken"]) > MOST_NAMED:
            lines.append(f"  and {len(result['broken']) - MOST_NAMED} more, in the JSON result")
    return "\n".join(lines)


def _line(weights: str, method: str, rows: Sequence[dict[str, Any]]) -> str:
    top1, top5 = ([100 * row[key] for row in rows] for key in ("top1", "top5"))
    spread = f" ({min(top1):.1f} to {max(top1):.1f})" if len(rows) > 1 else ""
    intervals = ", ".join("{:.1f} to {:.1f}".format(*(100 * bound for bound in row["top1_interval"])) for row in rows)
    name = f"{weights} weights, {'k-NN' if method == 'knn' else method}"
    return (
        f"  {name:24s} top-1 {statistics.mean(top1):5.1f} %{spread}, top-5 {statistics.mean(top5):5.1f} %; "
        f"95 % intervals by seed: {intervals}"
    )


def _make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out}: cannot be made a folder ({error.strerror}); choose another --out") from error


def _read_data(data: Path, train_split: str | None, test_split: str | None) -> _Data:
    """The two splits asked for or usual; the one there is, to be cut, where none is asked for."""
    splits = available_splits(data)
    if len(splits) == 1 and train_split is None and test_split is None:
        return _Data((read_labelled_split(data, splits[0]),))
    if train_split == test_split is not None:
        raise UsageError(f"{data}: split {train_split!r} cannot be both learned from and tested")
    train = read_labelled_split(data, train_split or "train")
    return _Data((train, read_labelled_split(data, test_split or "val", train.classes)))


def _all_features(backbone: Backbone, source: _Data, overrides: TestOverrides, kept_in: Path | None) -> Features:
    protocol = find_protocol(PROTOCOL)
    parts = [
        extract_features(
            backbone, manifest, protocol_for_split(manifest, protocol, backbone.preprocessing), overrides, kept_in
        )
        for manifest in source.manifests
    ]
    return Features(
        tuple(name for part in parts for name in part.names),
        np.concatenate([part.labels for part in parts]),
        np.concatenate([part.vectors for part in parts]),
        tuple(reason for part in parts for reason in part.reasons),
    )


def _answers(
    features: Features, source: _Data, seed: int, methods: Sequence[Method], k: int, weights: str
) -> Iterator[dict[str, Any]]:
    """One row of the result per method: learned from the training samples that were read, told of all tested."""
    split, classes = source.split(features.labels, seed), source.manifests[0].classes
    train, test = (places[features.read[places]] for places in (split.train, split.test))
    if not (len(train) and len(test)):
        raise UserError(
            f"{source.manifests[0].root}: of the files that could be read {len(train)} are to learn from and "
            f"{len(test)} to test; mend the data set"
        )
    x, y = features.vectors[train], features.labels[train]
    for method in methods:
        chosen: dict[str, Any] = {}
        if method == "knn":
            probabilities = nearest(x, y, features.vectors[test], len(classes), k)
        else:
            probabilities, chosen = linear(x, y, features.vectors[test], len(classes), seed)
        listed = len(split.test) + split.lost
        metrics = measure(features.labels[test], _ranked(probabilities), classes, listed=listed, seed=seed)
        yield {"weights": weights, "method": method, "seed": seed, "train": len(train)} | _figures(metrics) | chosen


def _figures(metrics: Metrics) -> dict[str, Any]:
    """Named as in a test's results.json."""
    return {
        **metrics.figures(),
        "test": {"listed": metrics.listed, "scored": metrics.scored, "failed": metrics.failed},
    }


def _ranked(probabilities: NDArray[np.float64]) -> NDArray[np.int64]:
    """(N, up to 5) classes, most probable first; -1 in place of a class that no neighbour voted for."""
    ranked = ranking(probabilities, 5)
    return np.where(np.take_along_axis(probabilities, ranked, axis=1) > 0, ranked, -1)


def nearest(
    x: NDArray[np.float32], y: NDArray[np.int64], test: NDArray[np.float32], classes: int, k: int
) -> NDArray[np.float64]:
    """(N, C), (N,) and (M, C) -> (M, K) shares of the votes of the k nearest by cosine, weighted by likeness."""
    if k > len(x):
        raise UsageError(f"--k {k}: there are {len(x)} samples to learn from; ask for fewer neighbours")

    def votes(distances: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.exp(-distances / TEMPERATURE)

    model = KNeighborsClassifier(k, metric="cosine", weights=votes).fit(x, y)
    return _spread(model.predict_proba(test), model.classes_, classes)


def linear(
    x: NDArray[np.float32], y: NDArray[np.int64], test: NDArray[np.float32], classes: int, seed: int
) -> tuple[NDArray[np.float64], dict[str, Any]]:
    """(N, C), (N,) and (M, C) -> (M, K) probabilities of logistic regression on standardised features, and its C.

    C is the best of C_GRID in a cross-validation of the training samples, whose folds the seed draws.
    """
    present, counts = np.unique(y, return_counts=True)
    folds = min(FOLDS, int(counts.min()))
    if len(present) < 2 or folds < 2:
        raise UsageError(
            f"a linear probe needs two classes and two training samples of each, there are {len(present)} classes and "
            f"{counts.min()} of the rarest; use --method knn"
        )
    search = GridSearchCV(
        make_pipeline(StandardScaler(), LogisticRegression(max_iter=MOST_ITERATIONS)),
        {"logisticregression__C": C_GRID},
        cv=StratifiedKFold(folds, shuffle=True, random_state=seed),
    )
    with warnings.catch_warnings():
        # A weak C on features that separate the classes has no end; such a C is rarely the one chosen.
        warnings.simplefilter("ignore", ConvergenceWarning)
        search.fit(x, y)
    iterations = int(np.max(search.best_estimator_[-1].n_iter_))
    chosen = {"C": search.best_params_["logisticregression__C"], "converged": iterations < MOST_ITERATIONS}
    return _spread(search.predict_proba(test), search.classes_, classes), chosen


def _spread(probabilities: NDArray[np.float64], present: NDArray[np.int64], classes: int) -> NDArray[np.float64]:
    """Columns of the classes that were learned -> columns of all K, zero for the others."""
    full = np.zeros((len(probabilities), classes))
    full[:, present] = probabilities
    return full
