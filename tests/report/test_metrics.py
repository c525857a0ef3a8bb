"""The metrics of random scores against plain NumPy and loops, and what failed videos change."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from sklearn.metrics import top_k_accuracy_score

from tests.report.report_pages import build_scores, metrics_of
from video_swinv2.errors import UserError
from video_swinv2.report.metrics import credits, most_confused, video_probabilities
from video_swinv2.report.scores import Scores


def random_scores(seed: int, n: int, views: int, classes: int, failed: int, present: int | None = None) -> Scores:
    """Scores that are right about half of the time, with labels from the first `present` classes only."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, present or classes, n)
    logits = rng.normal(size=(n, views, classes)) * 2
    logits[np.arange(n), :, labels] += 1.5
    broken = rng.choice(n, failed, replace=False)
    return build_scores(labels, logits, failed=broken, classes=[f"c{i}" for i in range(classes)])


def by_hand(scores: Scores, average: str) -> tuple[list[int], list[np.ndarray]]:
    """(labels, mean probabilities) of the scored videos, computed one video and one view at a time."""
    labels, probabilities = [], []
    for label, logits, reason in zip(scores.labels, scores.logits, scores.reasons, strict=True):
        if reason:
            continue
        views = [row.astype(float) for row in logits]
        if average == "logit":
            views = [np.mean(views, axis=0)]
        labels.append(int(label))
        probabilities.append(np.mean([np.exp(v) / np.exp(v).sum() for v in views], axis=0))
    return labels, probabilities


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("seed", "n", "views", "classes", "failed", "present"),
    [
        (0, 200, 12, 6, 0, None),
        (1, 137, 4, 40, 9, None),
        (2, 60, 1, 400, 3, 30),
        (3, 2500, 2, 2, 1, None),
        (4, 9, 3, 3, 8, 1),
        (5, 7, 2, 1, 1, None),  # one class in all, of which scikit-learn's confusion matrix warns
    ],
)
@pytest.mark.parametrize("average", ["prob", "logit"])
def test_every_figure(
    seed: int, n: int, views: int, classes: int, failed: int, present: int | None, average: str
) -> None:
    scores = random_scores(seed, n, views, classes, failed, present)
    labels, probabilities = by_hand(scores, average)
    np.testing.assert_allclose(video_probabilities(scores, average), probabilities, atol=1e-12)
    metrics = metrics_of(scores, average=average)

    orders = [[k for _, k in sorted((-p[k], k) for k in range(classes))] for p in probabilities]
    answers = [order[0] for order in orders]
    right = sum(answer == label for answer, label in zip(answers, labels, strict=True))
    scored = n - failed
    assert (metrics.listed, metrics.scored, metrics.failed) == (n, scored, failed)
    assert metrics.top1 == pytest.approx(right / scored)
    in_five = sum(label in order[:5] for order, label in zip(orders, labels, strict=True)) / scored
    assert metrics.top5 == (pytest.approx(in_five) if classes > 5 else None)
    counts = np.bincount(labels, minlength=classes)
    assert metrics.chance == 1 / classes
    assert metrics.majority == (f"c{counts.argmax()}", counts.max() / scored)
    assert metrics.top1_bounds == pytest.approx((right / n, (right + failed) / n))

    table = np.zeros((classes, classes), int)
    for label, answer in zip(labels, answers, strict=True):
        table[label, answer] += 1
    np.testing.assert_array_equal(metrics.confusion, table)
    accuracies = [table[k, k] / table[k].sum() for k in range(classes) if table[k].sum()]
    assert metrics.mean_class_accuracy == pytest.approx(np.mean(accuracies))
    for k, row in enumerate(metrics.per_class):
        assert (row.name, row.n) == (f"c{k}", table[k].sum())
        assert row.accuracy == (pytest.approx(table[k, k] / row.n) if row.n else None)
    pairs = [(table[i, j], i, j) for i in range(classes) for j in range(classes) if i != j and table[i, j]]
    assert [pair.count for pair in metrics.confused_pairs] == sorted((p[0] for p in pairs), reverse=True)[:12]
    for pair in metrics.confused_pairs:
        i, j = int(pair.label[1:]), int(pair.answer[1:])
        assert (pair.count, pair.share) == (table[i, j], pytest.approx(table[i, j] / table[i].sum()))


def test_top5_agrees_with_scikit_learn() -> None:
    scores = random_scores(7, 300, 3, 30, 0)
    expected = top_k_accuracy_score(scores.labels, video_probabilities(scores), k=5, labels=np.arange(30))
    assert metrics_of(scores).top5 == pytest.approx(expected)


def test_averages_differ_where_views_disagree() -> None:
    """A confident view against two that lean the other way: probabilities follow the two, logits the one."""
    logits = np.array([[[9, 0], [0, 1], [0, 1]]], dtype=np.float16)
    scores = build_scores(np.array([1]), logits)
    sure, lean = 1 / (1 + np.exp(-9.0)), 1 / (1 + np.exp(1.0))
    assert video_probabilities(scores, "prob")[0, 0] == pytest.approx((sure + 2 * lean) / 3)
    assert video_probabilities(scores, "logit")[0, 0] == pytest.approx(1 / (1 + np.exp(-7 / 3)))
    flipped = build_scores(np.array([1]), np.array([[[4, 0], [0, 1.5], [0, 1.5]]]))
    assert metrics_of(flipped, average="prob").top1 == 1.0
    assert metrics_of(flipped, average="logit").top1 == 0.0


def test_equal_scores_are_answered_the_same_everywhere() -> None:
    """The first of seven is the answer, and the six others share the four places left in the first five."""
    labels = np.array([0, 1, 2, 5, 6])
    metrics = metrics_of(build_scores(labels, np.zeros((5, 1, 7))))
    assert (metrics.top1, metrics.top5) == (0.2, pytest.approx((1 + 4 * 4 / 6) / 5))
    assert metrics.confusion[:, 0].tolist() == np.bincount(labels, minlength=7).tolist()


@pytest.mark.parametrize("classes", [2, 5, 6])
def test_top5_is_left_out_where_it_is_certain(classes: int) -> None:
    metrics = metrics_of(random_scores(0, 60, 2, classes, 0))
    figures = metrics.figures()
    assert (figures["top5"] is None, figures["top5_interval"] is None) == (classes <= 5, classes <= 5)


def test_a_probability_of_zero_is_a_rank_like_any_other() -> None:
    """Seven classes, two with votes: the five without share the three places left, whatever their order."""
    probabilities = np.zeros((7, 7))
    probabilities[:, 3], probabilities[:, 6] = 0.9, 0.1
    found = credits(np.arange(7), probabilities, 5)
    assert found.tolist() == pytest.approx([0.6, 0.6, 0.6, 1, 0.6, 0.6, 1])
    assert found.sum() == pytest.approx(5), "five of the seven places"


def test_two_classes_have_precision_recall_and_areas() -> None:
    """Six videos by hand: three of four `fight` found, one of two `calm` mistaken for it."""
    fight = np.array([0.9, 0.8, 0.7, 0.2, 0.6, 0.1])
    logits = np.log(np.stack([1 - fight, fight], axis=1))[:, None]
    metrics = metrics_of(build_scores(np.array([1, 1, 1, 1, 0, 0]), logits, classes=["calm", "fight"]))
    two = metrics.two_classes
    assert two is not None
    assert two.roc_auc == pytest.approx(7 / 8), "of 8 pairs of one each, one is in the wrong order"
    calm, found = two.classes
    assert (found.precision, found.recall, found.f1) == pytest.approx((3 / 4, 3 / 4, 3 / 4))
    assert (calm.precision, calm.recall, calm.f1, calm.n) == pytest.approx((1 / 2, 1 / 2, 1 / 2, 2))
    assert found.pr_auc == pytest.approx((1 + 1 + 1 + 4 / 5) / 4)
    assert (metrics.chance, metrics.majority) == (0.5, ("fight", pytest.approx(2 / 3)))
    assert metrics_of(build_scores(np.array([1, 1]), logits[:2], classes=["calm", "fight"])).two_classes is None


def test_a_failed_video_moves_the_bounds_and_nothing_else() -> None:
    whole = random_scores(5, 50, 2, 6, 0)
    broken = Scores(
        (*whole.paths, "z.mp4"),
        np.append(whole.labels, 3),
        np.concatenate([whole.logits, np.full((1, 2, 6), np.nan, np.float16)]),
        np.concatenate([whole.views, np.full((1, 2, 5), -1, np.int32)]),
        (*whole.reasons, "empty file"),
        whole.classes,
        {},
    )
    before, after = metrics_of(whole), metrics_of(broken)
    assert (before.top1, before.top5, before.top1_interval) == (after.top1, after.top5, after.top1_interval)
    assert before.mean_class_accuracy == after.mean_class_accuracy
    np.testing.assert_array_equal(before.confusion, after.confusion)
    assert before.top1_bounds == (before.top1, before.top1)
    assert after.top1_bounds[0] < before.top1 < after.top1_bounds[1]


def test_most_confused_is_by_count_then_share() -> None:
    table = np.array([[5, 2, 0], [2, 1, 0], [0, 3, 0]])
    pairs = most_confused(table, ("a", "b", "c"))
    assert [(pair.label, pair.answer, pair.count) for pair in pairs] == [("c", "b", 3), ("b", "a", 2), ("a", "b", 2)]
    assert pairs[1].share == pytest.approx(2 / 3)


def test_no_scored_video_is_no_accuracy() -> None:
    with pytest.raises(UserError, match=r"none of the 3 listed videos.*0\.mp4: broken"):
        metrics_of(random_scores(0, 3, 1, 4, 3))


def test_videos_lost_in_preparation_bound_the_accuracy_too() -> None:
    scores = random_scores(0, 50, 3, 5, failed=2)
    plain, lost = metrics_of(scores), metrics_of(replace(scores, metadata={"lost_in_preparation": 10}))
    assert (lost.listed, lost.scored, lost.failed) == (60, 48, 12)
    assert (lost.top1, lost.top1_interval) == (plain.top1, plain.top1_interval)
    correct = round(plain.top1 * 48)
    assert lost.top1_bounds == (correct / 60, (correct + 12) / 60)
