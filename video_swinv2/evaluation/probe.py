"""Probes: how well k nearest neighbours and a linear classifier (scikit-learn's) classify with frozen features.

Letters: N training samples, M test samples, C channels, K classes.
"""

from __future__ import annotations

import statistics
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedGroupKFold, StratifiedKFold, train_test_split
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from video_swinv2.data.manifest import Manifest
from video_swinv2.data.sources import refuse_inside_tree
from video_swinv2.distributed.collectives import gather_shares
from video_swinv2.distributed.world import World, alone
from video_swinv2.errors import UsageError, UserError
from video_swinv2.escaping import terminal_lines
from video_swinv2.evaluation.features import Backbone, Features, extract_features, open_backbone, with_random_weights
from video_swinv2.evaluation.overrides import TestOverrides, refuse_detector_keys
from video_swinv2.evaluation.planning import read_origins
from video_swinv2.evaluation.protocols import find_protocol
from video_swinv2.evaluation.splits import available_splits, protocol_for_split, read_labelled_split
from video_swinv2.files import create_folder, write_json
from video_swinv2.report.intervals import number_sources
from video_swinv2.report.markdown import baseline_line, few_sources_warning
from video_swinv2.report.metrics import Metrics, metrics_of_probabilities

Method = Literal["knn", "linear"]
Fold = tuple[NDArray[np.int64], NDArray[np.int64]]
PROTOCOL = "center-1x1"
RESULT = "probe.json"
HELD_OUT_FOLDS = 5  # a data set with only one split is tested on one of so many parts, a fifth of each class
TEMPERATURE = 0.07  # of the neighbours' votes, exp(cosine / temperature): arXiv 1805.01978, and DINO's k-NN
# scikit-learn's C of logistic regression, the inverse of the regularisation strength: 0.0001 to 10.
C_GRID = tuple(10.0**power for power in range(-4, 2))
FOLDS = 3  # of the cross-validation that chooses C
MAX_ITERATIONS = 300  # of L-BFGS, scikit-learn's default solver
# scikit-learn warns that labels might be numbers to predict if most classes have a single sample.
FEW_PER_CLASS = "The number of unique classes is greater than 50%"
GIVE_GROUPS = "give the list a column group, or make splits with `python -m data_prep split`"
MAX_NAMED_FILES = 20  # in the summary; probe.json names every file that could not be read


@dataclass(frozen=True)
class TrainTestIndices:
    """Indices of the training and the test samples, and how many test videos `data_prep` could not prepare."""

    train: NDArray[np.int64]
    test: NDArray[np.int64]
    failed_in_preparation: int


@dataclass(frozen=True)
class ProbeData:
    """The samples of all splits in use as one list, and how they are divided into training and test samples.

    Two manifests are a training and a test split. A single manifest is divided at random, differently for each seed;
    samples of one group, such as clips of one recording, stay together.
    """

    manifests: tuple[Manifest, ...]

    @cached_property
    def origins(self) -> list[str]:
        """The group of each sample; '' if unknown."""
        return [origin for manifest in self.manifests for origin in read_origins(manifest)]

    @property
    def description(self) -> str:
        """How training and test samples are divided, in words for the summary."""
        if len(self.manifests) == 2:
            return f"splits {self.manifests[0].split} and {self.manifests[1].split} of the data set"
        share, split = f"{1 / HELD_OUT_FOLDS:.0%}", self.manifests[0].split
        if any(self.origins):
            return f"about {share} of each class of split {split} held out in whole groups, drawn by the seed"
        return f"{share} of each class of split {split} held out, drawn by the seed"

    @property
    def notes(self) -> tuple[str, ...]:
        """Remarks for the user: those on the splits, and on samples of unknown group where one split is divided."""
        notes = [note for manifest in self.manifests for note in manifest.notes]
        unknown = self.origins.count("")
        if len(self.manifests) == 1 and unknown == len(self.origins):
            notes.append(
                "no groups are known: samples of one recording may be both trained and tested on; if there are such, "
                f"{GIVE_GROUPS}"
            )
        elif len(self.manifests) == 1 and unknown:
            notes.append(
                f"{unknown} of {len(self.origins)} samples have no group, and count as independent; {GIVE_GROUPS}"
            )
        return tuple(notes)

    def divide(self, labels: NDArray[np.int64], seed: int) -> TrainTestIndices:
        """Divide the samples into training and test samples. labels: one per sample of all manifests.

        Raises UsageError if classes or groups are too few or too small to be divided.
        """
        sizes = [len(manifest.entries) for manifest in self.manifests]
        if len(sizes) == 2:
            # The test split follows the training split in the common list, so its indices start at sizes[0].
            return TrainTestIndices(
                np.arange(sizes[0]), sizes[0] + np.arange(sizes[1]), self.manifests[1].failed_in_preparation
            )
        (manifest,) = self.manifests
        try:
            if any(self.origins):
                train, test = _hold_out_groups(labels, number_sources(self.origins), seed)
            else:
                train, test = train_test_split(
                    np.arange(sizes[0]), test_size=1 / HELD_OUT_FOLDS, stratify=labels, random_state=seed
                )
        except ValueError as error:
            # Only the first sentence of scikit-learn's message: the rest explains its own arguments.
            raise UsageError(
                f"{manifest.root}: cannot be divided into training and test ({str(error).split('.')[0].lower()}); "
                "use a data set with splits of its own"
            ) from error
        return TrainTestIndices(np.sort(train), np.sort(test), manifest.failed_in_preparation)


def _hold_out_groups(labels: NDArray[np.int64], groups: NDArray[np.int64], seed: int) -> Fold:
    """Indices of training and test samples that share no group; the test is a fifth of each class, as far as possible.

    labels, groups: (n,). Raises ValueError if no division leaves samples of every class to train on.
    """
    for train, test in _grouped_folds(labels, groups, HELD_OUT_FOLDS, seed):
        if _trains_on_every_class(labels, train):
            return train, test
    raise ValueError("the groups are too few or too large to leave every class in training")


def _grouped_folds(labels: NDArray[np.int64], groups: NDArray[np.int64], folds: int, seed: int) -> list[Fold]:
    """(training indices, test indices) of each fold; a group is on one side. labels, groups: (n,).

    Fewer than `folds` if there are fewer groups, or fewer samples of each class; none if these are fewer than two.
    """
    folds = min(folds, len(np.unique(groups)), int(np.bincount(labels).max()))
    if folds < 2:
        return []
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        # Warns of a class with fewer samples than folds, which is then absent from some folds.
        warnings.filterwarnings("ignore", "The least populated class", UserWarning)
        return list(splitter.split(labels, labels, groups))


def _trains_on_every_class(labels: NDArray[np.int64], train: NDArray[np.int64]) -> bool:
    return len(np.unique(labels[train])) == len(np.unique(labels))


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
    world: World | None = None,
) -> dict[str, Any]:
    """Probe the frozen features of any checkpoint, once for each of the seeds 0, 1, ..., `seeds` - 1.

    The splits default to the data set's own train and val. A data set with a single split is divided at random,
    differently for each seed, into whole groups where groups are known. The seed also determines the folds that choose
    C and, with `random_weights`, the weights of an untrained model of the same architecture, which is probed for
    comparison.

    With `out`, features are cached there and probe.json is written. The processes of `world` share the computation of
    the features, and rank 0 fits the classifiers. Returns the content of probe.json, on every process. Raises
    UsageError for invalid labels, splits and numbers, and UserError if no training or no test file could be read.
    """
    if k < 1 or seeds < 1:
        raise UsageError("k and seeds must be 1 or more")
    if out is not None:
        refuse_inside_tree(out, [data])
    overrides = overrides or TestOverrides()
    refuse_detector_keys(overrides, "a probe of features")
    world = world or alone(overrides.device)
    backbone = open_backbone(Path(model_path), overrides)
    source = _read_probe_data(Path(data), train_split, test_split)
    if out is not None:
        create_folder(out, "--out")
    # Before the features are computed, which may take hours.
    if world.rank == 0 and source.notes:
        print(terminal_lines(source.notes), file=sys.stderr)
    trained = _all_features(backbone, source, overrides, out, world)
    rows: list[dict[str, Any]] = []
    # The features of the given model do not depend on the seed; only their division and the folds do. Each set of
    # random weights, however, is another model with features of its own.
    for seed in range(seeds):
        rows += _probe_rows(trained, source, seed, methods, k, "given", world)
    for seed in range(seeds if random_weights else 0):
        fresh = _all_features(with_random_weights(backbone, seed), source, overrides, out, world)
        rows += _probe_rows(fresh, source, seed, methods, k, "random", world)
    rows = gather_shares(world, rows)[0]
    result = {
        "model": backbone.record,
        "preprocessing": asdict(backbone.preprocessing),
        "data": str(data),
        "data_fingerprint": {manifest.split: manifest.fingerprint for manifest in source.manifests},
        "classes": len(source.manifests[0].classes),
        "channels": trained.vectors.shape[1],
        "split": source.description,
        "notes": list(source.notes),
        "k": k,
        "seeds": seeds,
        "rows": rows,
        "broken": [[name, why] for name, why in zip(trained.names, trained.reasons, strict=True) if why],
    }
    if out is not None and world.rank == 0:
        write_json(out / RESULT, result)
    return result


def summarize_probe(result: dict[str, Any]) -> str:
    """The result in a few lines to print: mean and range over seeds, and the confidence interval of each seed."""
    rows = result["rows"]
    learned, tested = rows[0]["train"], rows[0]["test"]["scored"]
    lines = [
        f"{result['model']['path']} ({result['model']['layout']}), {result['channels']} channels",
        f"{result['data']}: {result['classes']} classes, {learned} training and {tested} test samples; "
        f"{result['split']}",
    ]
    # dict.fromkeys keeps the order in which values first occur, unlike a set.
    for weights in dict.fromkeys(row["weights"] for row in rows):
        for method in dict.fromkeys(row["method"] for row in rows):
            same = [row for row in rows if (row["weights"], row["method"]) == (weights, method)]
            lines.append(_summary_line(weights, method, same))
    lines.append(f"  {baseline_line(rows[0])}")
    if warning := few_sources_warning(rows[0]["sources"], "test samples"):
        lines.append(warning)
    if result["broken"]:
        failed = [100 * bound for bound in rows[0]["top1_bounds"]]
        lines.append(
            f"{len(result['broken'])} files could not be read; top-1 over all listed lies between {failed[0]:.1f} and "
            f"{failed[1]:.1f} % ({rows[0]['method']}, seed 0)"
        )
        lines += [f"  {name}: {reason}" for name, reason in result["broken"][:MAX_NAMED_FILES]]
        if len(result["broken"]) > MAX_NAMED_FILES:
            lines.append(f"  and {len(result['broken']) - MAX_NAMED_FILES} more, in the JSON result")
    return terminal_lines(lines)


def _summary_line(weights: str, method: str, rows: Sequence[dict[str, Any]]) -> str:
    top1 = [100 * row["top1"] for row in rows]
    # None of the rows has a top-5 if there are too few classes for one.
    top5 = [row["top5"] for row in rows if row["top5"] is not None]
    first_five = f", top-5 {100 * statistics.mean(top5):.1f} %" if top5 else ""
    spread = f" ({min(top1):.1f} to {max(top1):.1f})" if len(rows) > 1 else ""
    intervals = ", ".join("{:.1f} to {:.1f}".format(*(100 * bound for bound in row["top1_interval"])) for row in rows)
    name = f"{weights} weights, {'k-NN' if method == 'knn' else method}"
    return f"  {name:24s} top-1 {statistics.mean(top1):5.1f} %{spread}{first_five}; 95 % intervals by seed: {intervals}"


def _read_probe_data(data: Path, train_split: str | None, test_split: str | None) -> ProbeData:
    """Read the training and the test split (default train and val), or the data set's only split to divide by seed."""
    splits = available_splits(data)
    # Only if neither split is named: a user who names one wants that one, even if the data set has no other.
    if len(splits) == 1 and train_split is None and test_split is None:
        return ProbeData((read_labelled_split(data, splits[0], train=None),))
    if train_split == test_split is not None:
        raise UsageError(f"{data}: split {train_split!r} cannot be both trained on and tested")
    # The test split takes over the classes of the training split, so that equal labels mean equal classes.
    train = read_labelled_split(data, train_split or "train", train=None)
    test = read_labelled_split(data, test_split or "val", train.classes, train=train.split)
    return ProbeData((train, test))


def _all_features(
    backbone: Backbone, source: ProbeData, overrides: TestOverrides, cache: Path | None, world: World
) -> Features:
    """The features of all manifests as one list, in the order that `ProbeData.divide` expects."""
    protocol = find_protocol(PROTOCOL)
    parts = [
        extract_features(
            backbone, manifest, protocol_for_split(manifest, protocol, backbone.preprocessing), overrides, cache, world
        )
        for manifest in source.manifests
    ]
    return Features(
        tuple(name for part in parts for name in part.names),
        np.concatenate([part.labels for part in parts]),
        np.concatenate([part.vectors for part in parts]),
        tuple(reason for part in parts for reason in part.reasons),
    )


def _probe_rows(
    features: Features, source: ProbeData, seed: int, methods: Sequence[Method], k: int, weights: str, world: World
) -> Iterator[dict[str, Any]]:
    """On rank 0, train and test each method, and yield its row of the result.

    Samples that could not be read are left out.
    """
    if world.rank:
        return
    indices, classes = source.divide(features.labels, seed), source.manifests[0].classes
    train, test = (rows[features.read[rows]] for rows in (indices.train, indices.test))
    if not (len(train) and len(test)):
        raise UserError(
            f"{source.manifests[0].root}: only {len(train)} training and {len(test)} test files could be read; "
            "fix the data set"
        )
    x, y = features.vectors[train], features.labels[train]
    origins = [source.origins[row] for row in test]
    for method in methods:
        chosen: dict[str, Any] = {}
        if method == "knn":
            probabilities = knn_probabilities(x, y, features.vectors[test], len(classes), k)
        else:
            groups = number_sources([source.origins[row] for row in train])
            probabilities, chosen = linear_probabilities(x, y, features.vectors[test], len(classes), seed, groups)
        # Test files that could not be read, now or in preparation, still count for the bounds of top-1.
        listed = len(indices.test) + indices.failed_in_preparation
        metrics = metrics_of_probabilities(
            features.labels[test], probabilities, classes, listed=listed, sources=number_sources(origins)
        )
        yield {"weights": weights, "method": method, "seed": seed, "train": len(train)} | _figures(metrics) | chosen


def _figures(metrics: Metrics) -> dict[str, Any]:
    """The metrics under the keys that they have in a test's results.json."""
    return {
        **metrics.figures(),
        "test": {"listed": metrics.listed, "scored": metrics.scored, "failed": metrics.failed},
    }


def knn_probabilities(
    x: NDArray[np.float32], y: NDArray[np.int64], test: NDArray[np.float32], classes: int, k: int
) -> NDArray[np.float64]:
    """x (N, C), y (N,), test (M, C) -> (M, K): the votes of the k nearest neighbours by cosine similarity.

    Each neighbour votes with weight exp(cosine / TEMPERATURE); the votes for a sample are normalised to sum to 1.
    Raises UsageError if k > N.
    """
    if k > len(x):
        raise UsageError(f"--k {k}: there are only {len(x)} training samples; use a smaller k")

    def votes(distances: NDArray[np.float64]) -> NDArray[np.float64]:
        # scikit-learn's cosine distance is 1 - cosine, so this differs from exp(cosine / TEMPERATURE) by the constant
        # factor exp(-1 / TEMPERATURE), which normalising cancels.
        return np.exp(-distances / TEMPERATURE)

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", FEW_PER_CLASS, UserWarning)
        model = KNeighborsClassifier(k, metric="cosine", weights=votes).fit(x, y)
    return _spread(model.predict_proba(test), model.classes_, classes)


def linear_probabilities(
    x: NDArray[np.float32],
    y: NDArray[np.int64],
    test: NDArray[np.float32],
    classes: int,
    seed: int,
    groups: NDArray[np.int64] | None = None,
) -> tuple[NDArray[np.float64], dict[str, Any]]:
    """x (N, C), y (N,), test (M, C) -> (M, K) probabilities of logistic regression, with the C chosen.

    Features are standardised first. C is the best of C_GRID by cross-validation on the training samples, whose folds
    are drawn with `seed` and keep `groups` (N,) together, if every class has enough of them. Raises UsageError for
    fewer than two classes or fewer than two samples of the rarest class.
    """
    present, counts = np.unique(y, return_counts=True)
    # Stratified folds need at least one sample of every class in each fold.
    folds = min(FOLDS, int(counts.min()))
    if len(present) < 2 or folds < 2:
        raise UsageError(
            f"a linear probe needs two classes and two training samples of each; there are {len(present)} classes and "
            f"{counts.min()} samples of the rarest; use --method knn"
        )
    # The scaler is part of the pipeline, so that within each fold it is fitted to the training samples only.
    search = GridSearchCV(
        make_pipeline(StandardScaler(), LogisticRegression(max_iter=MAX_ITERATIONS)),
        {"logisticregression__C": C_GRID},
        cv=_folds_to_choose_with(y, np.arange(len(y)) if groups is None else groups, folds, seed),
    )
    with warnings.catch_warnings():
        # On separable features, logistic regression with weak regularisation (a large C) does not converge. Such a C is
        # rarely chosen; whether the chosen one converged is part of the result.
        warnings.simplefilter("ignore", ConvergenceWarning)
        warnings.filterwarnings("ignore", FEW_PER_CLASS, UserWarning)
        search.fit(x, y)
    iterations = int(np.max(search.best_estimator_[-1].n_iter_))
    chosen = {"C": search.best_params_["logisticregression__C"], "converged": iterations < MAX_ITERATIONS}
    return _spread(search.predict_proba(test), search.classes_, classes), chosen


def _folds_to_choose_with(y: NDArray[np.int64], groups: NDArray[np.int64], folds: int, seed: int) -> list[Fold]:
    """The folds of the cross-validation, without groups if some fold could not train on every class otherwise."""
    if len(np.unique(groups)) < len(y):
        grouped = _grouped_folds(y, groups, folds, seed)
        if grouped and all(_trains_on_every_class(y, train) for train, _ in grouped):
            return grouped
    return list(StratifiedKFold(folds, shuffle=True, random_state=seed).split(y, y))


def _spread(probabilities: NDArray[np.float64], present: NDArray[np.int64], classes: int) -> NDArray[np.float64]:
    """(M, classes with training samples) -> (M, K), zero for the other classes. present: those classes, ascending."""
    full = np.zeros((len(probabilities), classes))
    full[:, present] = probabilities
    return full
