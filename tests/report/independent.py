"""Every figure of a report, computed a second time in plain NumPy and loops that share no code with the package."""

from __future__ import annotations

import itertools
import json
import random
from math import comb
from pathlib import Path
from typing import Any

import numpy as np
import scipy.stats  # type: ignore[import-untyped]  # SciPy has no type hints
from sklearn.metrics import auc, precision_recall_curve, roc_curve

Z = 1.959963984540054


def read(path: Path) -> dict[str, Any]:
    """The arrays of a score file, its metadata decoded."""
    with np.load(path) as archive:
        arrays = dict(archive)
    return arrays | {"metadata": json.loads(str(arrays["metadata"]))}


def chances(logits: np.ndarray, average: str) -> np.ndarray:
    """(N, V, K) logits -> (N, K) probabilities."""
    logits = logits.astype(np.float64)
    if average == "logit":
        logits = logits.mean(axis=1, keepdims=True)
    powers = np.exp(logits)
    return (powers / powers.sum(axis=2)[:, :, None]).mean(axis=1)


def groups(origins: list[str]) -> list[list[int]]:
    """The places of the videos of each source; an unknown origin is a source of its own."""
    found: dict[Any, list[int]] = {}
    for place, origin in enumerate(origins):
        found.setdefault(origin or place, []).append(place)
    return list(found.values())


def interval(values: np.ndarray, sources: list[list[int]], weights: np.ndarray, centres: np.ndarray) -> list[float]:
    """Wilson's interval on Kish's effective number, over the design effect, times the ratio of t quantiles squared."""
    n, m = len(values), len(sources)
    size = sum(weights) ** 2 / sum(weights**2)
    parts = [w * (v - c) for w, v, c in zip(weights, values, centres, strict=True)]
    one_by_one = sum(part**2 for part in parts) * n / max(n - 1, 1)
    share = float(sum(weights * values))
    if m == 1 or one_by_one < 1e-20:
        return wilson(share, size * m / n)
    together = sum(sum(parts[place] for place in of) ** 2 for of in sources) * m / (m - 1)
    widening = (scipy.stats.t.isf(0.025, m - 1) / scipy.stats.t.isf(0.025, n - 1)) ** 2
    return wilson(share, size / max(1, together / one_by_one) / widening)


def mean_interval(values: np.ndarray, sources: list[list[int]]) -> list[float]:
    """That of a plain mean."""
    return interval(values, sources, np.full(len(values), 1 / len(values)), np.full(len(values), values.mean()))


def wilson(share: float, n: float) -> list[float]:
    """The two p at which `share` lies z standard errors away: roots of (share - p)^2 = z^2 p (1 - p) / n."""
    a, b, c = 1 + Z**2 / n, -(2 * share + Z**2 / n), share**2
    root = max(b**2 - 4 * a * c, 0) ** 0.5
    return [max(0.0, (-b - root) / (2 * a)), min(1.0, (-b + root) / (2 * a))]


def figures(path: Path) -> dict[str, Any]:
    """What results.json must contain."""
    file = read(path)
    record, status = file["metadata"], file["status"] == "ok"
    labels, logits = file["labels"][status], file["logits"][status]
    origins = [o for o, good in zip(record.get("origins", [""] * len(status)), status, strict=True) if good]
    n, k = len(labels), len(file["classes"])
    p = chances(logits, record["average"])
    order = [sorted(range(k), key=lambda c, row=row: (-row[c], c)) for row in p]
    right = np.array([o[0] == label for o, label in zip(order, labels, strict=True)], float)
    in_five = np.array([label in o[:5] for o, label in zip(order, labels, strict=True)], float)
    sources = groups(origins)
    table = np.zeros((k, k), int)
    for label, o in zip(labels, order, strict=True):
        table[label, o[0]] += 1
    per_class = []
    for c in range(k):
        of = labels == c
        if not of.any():
            per_class.append({"name": file["classes"][c], "n": 0, "accuracy": None, "interval": None})
            continue
        ends = mean_interval(right[of], groups([o for o, this in zip(origins, of, strict=True) if this]))
        per_class.append(
            {"name": file["classes"][c], "n": int(of.sum()), "accuracy": right[of].mean(), "interval": ends}
        )
    listed = len(status) + record.get("lost_in_preparation", 0)
    present = sum(1 for row in per_class if row["n"])
    weights = np.array([1 / present / per_class[label]["n"] for label in labels])
    recall = np.array([per_class[label]["accuracy"] for label in labels])
    commonest = max(range(k), key=lambda c: (per_class[c]["n"], -c))
    other = "logit" if record["average"] == "prob" else "prob"
    right_other = (chances(logits, other).argmax(axis=1) == labels).astype(float)
    return {
        "top1": right.mean(),
        "top5": in_five.mean() if k > 5 else None,
        "mean_class_accuracy": np.mean([row["accuracy"] for row in per_class if row["n"]]),
        "top1_interval": mean_interval(right, sources),
        "top5_interval": mean_interval(in_five, sources) if k > 5 else None,
        "mean_class_accuracy_interval": interval(right, sources, weights, recall),
        "chance": 1 / k,
        "majority": {"class": file["classes"][commonest], "share": per_class[commonest]["n"] / n},
        "two_classes": two_classes(labels, p, table, file["classes"]) if k == 2 and present == 2 else None,
        "top1_bounds": [right.sum() / listed, (right.sum() + listed - n) / listed],
        "videos": {"listed": listed, "scored": n, "failed": listed - n},
        "sources": len(sources),
        "other_average": {
            "average": other,
            "top1": right_other.mean(),
            "top1_interval": mean_interval(right_other, sources),
        },
        "per_class": per_class,
        "calibration": calibration(p.max(axis=1), right),
        "views_curve": views_curve(logits, labels, record, sources),
        "most_confused": confused(table, file["classes"]),
        "confusion": table,
        "surest_mistakes": mistakes(file, p, status),
    }


def two_classes(labels: np.ndarray, p: np.ndarray, table: np.ndarray, names: np.ndarray) -> dict[str, Any]:
    """By the definitions; average precision is the sum of precision times the step of recall."""
    rows = []
    for c in (0, 1):
        found, given, of = table[c, c], table[:, c].sum(), table[c].sum()
        precision, recall, _ = precision_recall_curve(labels == c, p[:, c])
        rows.append(
            {
                "name": names[c],
                "n": of,
                "precision": found / given if given else 0.0,
                "recall": found / of,
                "f1": 2 * found / (given + of),
                "pr_auc": -np.sum(np.diff(recall) * precision[:-1]),
            }
        )
    wrong, right, _ = roc_curve(labels == 1, p[:, 1])
    return {"roc_auc": auc(wrong, right), "classes": rows}


def calibration(sure: np.ndarray, right: np.ndarray) -> dict[str, Any]:
    """Fifteen bins, each with its upper edge but not its lower one (0 is in the first)."""
    bins = []
    for place in range(15):
        low, high = place / 15, (place + 1) / 15
        of = (sure > low if place else sure >= 0) & (sure <= high)
        if of.any():
            bins.append(
                {
                    "low": low,
                    "high": high,
                    "n": int(of.sum()),
                    "confidence": sure[of].mean(),
                    "accuracy": right[of].mean(),
                }
            )
    ece = sum(b["n"] / len(sure) * abs(b["confidence"] - b["accuracy"]) for b in bins)
    return {"ece": ece, "confidence": sure.mean(), "bins": bins}


def views_curve(
    logits: np.ndarray, labels: np.ndarray, record: dict[str, Any], sources: list[list[int]]
) -> list[dict[str, Any]]:
    """One subset of views at a time."""
    clips, crops = record["protocol_numbers"]["clips"], record["protocol_numbers"]["crops"]
    grid = logits.reshape(len(logits), clips, crops, -1)
    most = max(1, 96 // (clips * crops))
    points = []
    for b in range(1, crops + 1):
        for a in range(1, clips + 1):
            choices = list(
                itertools.product(itertools.combinations(range(clips), a), itertools.combinations(range(crops), b))
            )
            if len(choices) > most:
                choices = [choices[i] for i in sorted(random.Random(record["seed"]).sample(range(len(choices)), most))]
            hits = []
            for of_clips, of_crops in choices:
                part = grid[:, of_clips][:, :, of_crops].reshape(len(grid), a * b, -1)
                hits.append(chances(part, record["average"]).argmax(axis=1) == labels)
            share = np.mean(hits, axis=0)
            ends = mean_interval(share, sources)
            points.append({"clips": a, "crops": b, "subsets": len(choices), "top1": share.mean(), "interval": ends})
    return points


def confused(table: np.ndarray, classes: np.ndarray) -> list[dict[str, Any]]:
    """The twelve commonest mistakes: by count, then by share, then as listed."""
    found = [
        {"label": classes[i], "answer": classes[j], "count": table[i, j], "share": table[i, j] / table[i].sum()}
        for i, j in itertools.product(range(len(table)), repeat=2)
        if i != j and table[i, j]
    ]
    return sorted(found, key=lambda pair: (-pair["count"], -pair["share"]))[:12]


def mistakes(file: dict[str, Any], p: np.ndarray, status: np.ndarray) -> list[tuple[str, float]]:
    """(path, probability of the answer) of the twelve most confident."""
    paths, labels = file["paths"][status], file["labels"][status]
    wrong = [(str(path), row.max()) for path, row, label in zip(paths, p, labels, strict=True) if row.argmax() != label]
    return sorted(wrong, key=lambda pair: -pair[1])[:12]


def mcnemar(only_first: int, only_second: int) -> float:
    """Twice the smaller tail of a binomial with p = 1/2."""
    n = only_first + only_second
    return min(1.0, 2 * sum(comb(n, i) for i in range(min(only_first, only_second) + 1)) / 2**n)
