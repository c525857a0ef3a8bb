"""Every figure of a report, computed a second time in plain NumPy and loops that share no code with the package."""

from __future__ import annotations

import itertools
import json
import random
from math import comb
from pathlib import Path
from typing import Any

import numpy as np

DRAWS = 2000
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


def resamples(origins: list[str], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(draws, sources) how often each source is drawn, and (sources, N) which videos belong to it."""
    groups: dict[Any, list[int]] = {}
    for place, origin in enumerate(origins):
        groups.setdefault(origin or place, []).append(place)
    members = np.zeros((len(groups), len(origins)))
    for row, places in zip(members, groups.values(), strict=True):
        row[places] = 1
    drawn = np.random.default_rng(seed).integers(0, len(groups), size=(DRAWS, len(groups)))
    return np.stack([(drawn == source).sum(axis=1) for source in range(len(groups))], axis=1), members


def ends(values: np.ndarray, sources: int) -> list[float]:
    """The central 95 %, or Wilson's interval if all values are 0 or all are 1."""
    if (values == 0).all() or (values == 1).all():
        return wilson(values[0], sources)
    return np.quantile(values, [0.025, 0.975]).tolist()


def wilson(share: float, n: int) -> list[float]:
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
    times, members = resamples(origins, record["seed"])
    size = times @ members.sum(axis=1)
    recall_drawn = np.full((DRAWS, k), np.nan)
    table = np.zeros((k, k), int)
    for label, o in zip(labels, order, strict=True):
        table[label, o[0]] += 1
    per_class = []
    for c in range(k):
        of = labels == c
        if not of.any():
            per_class.append({"name": file["classes"][c], "n": 0, "accuracy": None, "interval": None})
            continue
        seen = times @ (members @ of)
        hit = times @ (members @ (of * right))
        recall_drawn[seen > 0, c] = hit[seen > 0] / seen[seen > 0]
        sources = int((members @ of > 0).sum())
        share = float(right[of].mean())
        per_class.append(
            {"name": file["classes"][c], "n": int(of.sum()), "accuracy": share, "interval": wilson(share, sources)}
        )
    listed = len(status) + record.get("lost_in_preparation", 0)
    other = "logit" if record["average"] == "prob" else "prob"
    right_other = (chances(logits, other).argmax(axis=1) == labels).astype(float)
    return {
        "top1": right.mean(),
        "top5": in_five.mean(),
        "mean_class_accuracy": np.mean([row["accuracy"] for row in per_class if row["n"]]),
        "top1_interval": ends(times @ (members @ right) / size, len(members)),
        "top5_interval": ends(times @ (members @ in_five) / size, len(members)),
        "mean_class_accuracy_interval": ends(np.nanmean(recall_drawn, axis=1), len(members)),
        "top1_bounds": [right.sum() / listed, (right.sum() + listed - n) / listed],
        "videos": {"listed": listed, "scored": n, "failed": listed - n},
        "sources": len(members),
        "other_average": {
            "average": other,
            "top1": right_other.mean(),
            "top1_interval": ends(times @ (members @ right_other) / size, len(members)),
        },
        "per_class": per_class,
        "calibration": calibration(p.max(axis=1), right),
        "views_curve": views_curve(logits, labels, record, times, members),
        "most_confused": confused(table, file["classes"]),
        "confusion": table,
        "surest_mistakes": mistakes(file, p, status),
    }


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
    logits: np.ndarray, labels: np.ndarray, record: dict[str, Any], times: np.ndarray, members: np.ndarray
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
            interval = ends(times @ (members @ share) / (times @ members.sum(axis=1)), len(members))
            points.append({"clips": a, "crops": b, "subsets": len(choices), "top1": share.mean(), "interval": interval})
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
