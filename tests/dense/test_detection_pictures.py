"""Pictures of detections: where boxes and masks are drawn, and in which colours."""

import torch

from video_swinv2.dense.detection_pictures import draw_detections
from video_swinv2.dense.segmentation_pictures import class_colours

CLASSES = ("cat", "dog\x1b[31m", "cow")


def test_boxes_and_masks_are_drawn_in_the_colours_of_their_classes():
    image = torch.full((3, 100, 120), 255, dtype=torch.uint8)
    masks = torch.zeros(2, 1, 100, 120)
    masks[1, 0, 60:80, 50:90] = 0.9
    found = {
        "boxes": torch.tensor([[10.0, 20, 40, 50], [50, 60, 90, 80]]),
        "labels": torch.tensor([3, 2]),
        "scores": torch.tensor([0.9, 0.4]),
    }
    colours = class_colours(3)
    drawn = draw_detections(image, found, CLASSES)
    assert (image == 255).all()  # the picture is a copy
    assert drawn.dtype == torch.uint8
    for (x, y), label in (((10, 40), 3), ((40, 40), 3), ((25, 50), 3), ((50, 75), 2), ((90, 70), 2)):
        assert torch.equal(drawn[:, y, x], colours[label - 1]), (x, y)
    assert (drawn[:, 40, 25] == 255).all()
    assert (drawn[:, 85:] == 255).all()
    masked = draw_detections(image, found | {"masks": masks}, CLASSES)
    inside = masked[:, 75, 70].float()
    assert torch.allclose(inside, 255 * 0.55 + 0.45 * colours[1].float(), atol=2)
    sure = draw_detections(image, found, CLASSES, min_score=0.5)
    assert torch.equal(sure[:, :50], drawn[:, :50])
    assert (sure[:, 56:] == 255).all()


def test_of_overlapping_masks_the_surest_is_seen():
    image = torch.full((3, 40, 40), 200, dtype=torch.uint8)
    masks = torch.zeros(2, 40, 40)
    masks[0, 5:20, 5:20] = masks[1, 15:35, 15:35] = 1
    found = {
        "boxes": torch.tensor([[5.0, 5, 20, 20], [15, 15, 35, 35]]),
        "labels": torch.tensor([1, 3]),
        "scores": torch.tensor([0.9, 0.8]),
        "masks": masks,
    }
    drawn = draw_detections(image, found, CLASSES).float()
    first, second = (200 * 0.55 + 0.45 * class_colours(3)[label].float() for label in (0, 2))
    assert torch.allclose(drawn[:, 18, 18], first, atol=2)  # where both are
    assert torch.allclose(drawn[:, 10, 17], first, atol=2)
    assert torch.allclose(drawn[:, 30, 30], second, atol=2)
    assert (drawn[:, 37, 37] == 200).all()


def test_nothing_to_draw():
    image = torch.randint(256, (3, 20, 30), dtype=torch.uint8)
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    assert torch.equal(draw_detections(image, nothing, CLASSES), image)
