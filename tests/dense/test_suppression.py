"""Non-maximum suppression against its definition, box by box."""

import math

import pytest
import torch
from torchvision.ops import box_iou

from tests.closeness import assert_close
from video_swinv2.dense.suppression import SOFT_NMS_SIGMA, Suppression, detections, soft_nms


def candidates(count=60, classes=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator) * 50
    boxes = torch.cat((corner, corner + 5 + torch.rand(count, 2, generator=generator) * 30), dim=1)
    return boxes, torch.rand(count, generator=generator), torch.randint(1, classes + 1, (count,), generator=generator)


def plain(boxes, scores, labels, min_score, max_detections, decay):
    """Greedy suppression: keep the best, change the scores of the others of its class, repeat."""
    left = {place: float(scores[place]) for place in range(len(boxes)) if scores[place] > min_score}
    kept = []
    while left and len(kept) < max_detections:
        best = max(left, key=left.get)
        if left[best] <= min_score:
            break
        kept.append((best, left.pop(best)))
        for place in left:
            if labels[place] == labels[best]:
                left[place] *= decay(float(box_iou(boxes[best][None], boxes[place][None])))
    return kept


@pytest.mark.parametrize("seed", range(5))
def test_soft_nms(seed):
    boxes, scores, labels = candidates(seed=seed)
    expected = plain(boxes, scores, labels, 0.1, 40, lambda iou: math.exp(-(iou**2) / SOFT_NMS_SIGMA))
    kept, lowered = Suppression(min_score=0.1, max_detections=40, soft=True)(boxes, scores, labels)
    assert kept.tolist() == [place for place, _ in expected]
    assert_close(lowered, torch.tensor([score for _, score in expected]))
    assert (lowered <= scores[kept]).all()
    assert scores.max() == candidates(seed=seed)[1].max()  # the caller's scores are left alone


@pytest.mark.parametrize("seed", range(5))
def test_hard_nms(seed):
    boxes, scores, labels = candidates(seed=seed)
    expected = plain(boxes, scores, labels, 0.1, 40, lambda iou: float(iou <= 0.4))
    kept, same = Suppression(min_score=0.1, max_overlap=0.4, max_detections=40)(boxes, scores, labels)
    assert kept.tolist() == [place for place, _ in expected]
    assert torch.equal(same, scores[kept])


@pytest.mark.parametrize("soft", [False, True])
def test_nothing_to_keep(soft):
    boxes, scores, labels = candidates()
    for count in (0, 5):
        kept, lowered = Suppression(min_score=1.0, soft=soft)(boxes[:count], scores[:count], labels[:count])
        assert kept.shape == lowered.shape == (0,)
    assert soft_nms(boxes[:0], scores[:0], labels[:0], 0.1, 10)[0].shape == (0,)


def test_detections_leave_out_the_background_and_what_is_outside():
    boxes = torch.tensor(
        [[[0.0, 0, 5, 5], [0, 0, 10, 10], [-20, 0, 0, 10]], [[0, 0, 5, 5], [30, 30, 90, 90], [0, 0, 9, 9]]]
    )
    scores = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7]])
    found, kept, labels = detections(boxes, scores, (40, 50), Suppression(max_overlap=1.0))
    assert kept.tolist() == pytest.approx([0.7, 0.3, 0.2])
    assert labels.tolist() == [2, 1, 1]
    assert found.tolist() == [[0, 0, 9, 9], [0, 0, 10, 10], [30, 30, 50, 40]]
