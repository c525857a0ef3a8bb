"""Augmentation of boxes and masks, compared with what happens to boxes that are drawn into an image."""

import pytest
import torch

import video_swinv2 as vs
from tests.closeness import assert_close
from video_swinv2.dense.detection_transforms import DetectionAugment, crop, fitted_size, flip, resize

SIZE = (60, 90)


def scene(count=5, seed=0):
    """Rectangles of whole pixels: an image with one channel pattern, the boxes, and the rectangles drawn as masks."""
    generator = torch.Generator().manual_seed(seed)
    low = torch.stack(
        (torch.randint(0, 50, (count,), generator=generator), torch.randint(0, 30, (count,), generator=generator)),
        dim=1,
    )
    high = low + torch.randint(12, 30, (count, 2), generator=generator)
    boxes = torch.cat((low, high), dim=1).float()
    target = {
        "boxes": boxes,
        "labels": torch.arange(1, count + 1),
        "masks": drawn(boxes, SIZE),
        "area": (boxes[:, 2:] - boxes[:, :2]).prod(dim=1),
        "iscrowd": torch.zeros(count, dtype=torch.int64),
        "image_id": torch.tensor(7),
    }
    return torch.randint(256, (3, *SIZE), generator=generator, dtype=torch.uint8), target


def drawn(boxes, size):
    """Boxes drawn as masks, (N, H, W): the pixels whose centres are inside."""
    y, x = torch.arange(size[0])[:, None] + 0.5, torch.arange(size[1])[None] + 0.5
    left, top, right, bottom = (side[:, None, None] for side in boxes.unbind(1))
    return ((x > left) & (x < right) & (y > top) & (y < bottom)).to(torch.uint8)


def overlap(one, other):
    """The intersection over union of pairs of masks, (N,)."""
    both, either = (one & other).flatten(1).sum(dim=1), (one | other).flatten(1).sum(dim=1)
    return both / either


def test_flip():
    image, target = scene()
    flipped, changed = flip(image, target)
    assert torch.equal(flipped, image.flip(-1))
    assert torch.equal(drawn(changed["boxes"], SIZE), target["masks"].flip(-1))
    assert torch.equal(changed["masks"], target["masks"].flip(-1))
    again, back = flip(flipped, changed)
    assert torch.equal(again, image)
    assert all(torch.equal(back[key], target[key]) for key in target)


@pytest.mark.parametrize("size", [(120, 180), (30, 45), (61, 100), (40, 91)])
def test_resize(size):
    image, target = scene()
    resized, changed = resize(image, target, size)
    assert resized.shape == (3, *size)
    assert changed["masks"].shape == (5, *size)
    # Boxes drawn at the new size are the resized drawings, up to the pixels at the borders.
    assert (overlap(drawn(changed["boxes"], size), changed["masks"]) > 0.7).all()
    scale = size[0] * size[1] / (SIZE[0] * SIZE[1])
    assert_close(changed["area"], target["area"] * scale)
    if size == (120, 180):  # twice the size: nothing is rounded
        assert torch.equal(drawn(changed["boxes"], size), changed["masks"])


@pytest.mark.parametrize(
    ("top", "left", "size"), [(10, 20, (40, 50)), (0, 0, (80, 120)), (30, 60, (50, 50)), (5, 0, (20, 90))]
)
def test_crop(top, left, size):
    image, target = scene(count=12)
    cropped, changed = crop(image, target, top, left, size)
    inside = image[:, top : top + size[0], left : left + size[1]]
    assert cropped.shape == (3, *size)
    assert torch.equal(cropped[:, : inside.shape[1], : inside.shape[2]], inside)
    assert (cropped[:, inside.shape[1] :] == 114).all()
    assert (cropped[:, :, inside.shape[2] :] == 114).all()
    # Brute force: cut every drawing, and keep those of which something is left.
    padded = torch.nn.functional.pad(target["masks"], (0, 60, 0, 60))
    cut = padded[:, top : top + size[0], left : left + size[1]]
    kept = cut.flatten(1).bool().any(dim=1)
    assert torch.equal(changed["masks"], cut[kept])
    assert torch.equal(changed["labels"], target["labels"][kept])
    assert torch.equal(drawn(changed["boxes"], size), cut[kept])
    assert torch.equal(changed["area"], cut[kept].flatten(1).sum(dim=1).float())
    assert len(changed["iscrowd"]) == kept.sum()
    assert changed["image_id"] == 7
    # Without masks, the same objects are kept, and the area is the share that is left of the box.
    _, boxes_only = crop(image, {key: value for key, value in target.items() if key != "masks"}, top, left, size)
    assert torch.equal(boxes_only["boxes"], changed["boxes"])
    assert_close(boxes_only["area"], changed["area"])


def test_the_box_of_what_a_crop_leaves_of_a_mask():
    """An L: the crop keeps its foot, which is lower than its box."""
    mask = torch.zeros(1, *SIZE, dtype=torch.uint8)
    mask[0, 10:40, 20:30] = 1
    mask[0, 30:40, 20:60] = 1
    target = {"boxes": torch.tensor([[20.0, 10.0, 60.0, 40.0]]), "labels": torch.tensor([1]), "masks": mask}
    image = torch.zeros(3, *SIZE, dtype=torch.uint8)
    _, changed = crop(image, target, 0, 35, (60, 55))
    assert changed["boxes"].tolist() == [[0.0, 30.0, 25.0, 40.0]]
    _, whole = crop(image, target, 5, 5, (50, 80))
    assert whole["boxes"].tolist() == [[15.0, 5.0, 55.0, 35.0]]


def test_crops_lose_objects():
    image, target = scene(count=12)
    _, changed = crop(image, target, 0, 0, (10, 10))
    assert 0 < len(changed["boxes"]) < 12 or not len(changed["boxes"])
    _, nothing = crop(image, target, 55, 85, (5, 5))
    assert nothing["boxes"].shape == (0, 4)
    assert nothing["masks"].shape == (0, 5, 5)


def test_multi_scale():
    """Shortest sides from 480 to 800, both included, with at most 1333 on the longer side, at the image's ratio."""
    augment = DetectionAugment(short_sides=(48, 80), max_side=110)
    image, target = scene()
    sizes, flips = [], 0
    for seed in range(300):
        out, changed = augment(image, target, torch.Generator().manual_seed(seed))
        height, width = out.shape[1:]
        sizes.append(min(height, width))
        assert max(height, width) <= 110
        assert abs(width / height - 1.5) < 0.02
        straight, mirrored = drawn(changed["boxes"], (height, width)), changed["masks"]
        assert (overlap(straight, mirrored) > 0.8).all()
        flips += bool(changed["boxes"][0, 0] / width - target["boxes"][0, 0] / 90 > 0.1) or bool(
            changed["boxes"][0, 0] / width - target["boxes"][0, 0] / 90 < -0.1
        )
    assert min(sizes) == 48
    assert max(sizes) == 73  # 110 pixels of width
    assert 100 < flips < 200


def test_large_scale_jitter():
    augment = DetectionAugment(jitter=(0.1, 2.0), jitter_size=64, flip=0.0)
    image, target = scene(count=12)
    kept = []
    for seed in range(100):
        out, changed = augment(image, target, torch.Generator().manual_seed(seed))
        assert out.shape == (3, 64, 64)
        assert out.dtype == torch.uint8
        kept.append(len(changed["boxes"]))
        if kept[-1]:
            sides = changed["boxes"][:, 2:] - changed["boxes"][:, :2]
            # Of boxes of some pixels, the drawn box contains the mask, and both nearly agree.
            large = (sides > 10).all(dim=1)
            assert (overlap(drawn(changed["boxes"], (64, 64)), changed["masks"])[large] > 0.7).all()
            assert changed["boxes"].min() >= 0
            assert changed["boxes"].max() <= 64
            assert (sides >= 1).all()
    assert max(kept) == 12
    assert min(kept) < 12


def test_a_function_of_the_generator_alone():
    augment = DetectionAugment(jitter=(0.1, 2.0), jitter_size=64)
    image, target = scene()
    torch.manual_seed(1)
    one = augment(image, target, torch.Generator().manual_seed(5))
    torch.manual_seed(2)
    two = augment(image, target, torch.Generator().manual_seed(5))
    other = augment(image, target, torch.Generator().manual_seed(6))
    assert torch.equal(one[0], two[0])
    assert all(torch.equal(one[1][key], two[1][key]) for key in one[1])
    assert not torch.equal(one[0], other[0])


def test_images_without_objects():
    image, _ = scene()
    empty = {
        "boxes": torch.zeros(0, 4),
        "labels": torch.zeros(0, dtype=torch.int64),
        "masks": torch.zeros(0, *SIZE, dtype=torch.uint8),
    }
    for augment in (DetectionAugment((48, 80), 110), DetectionAugment(jitter=(0.5, 2.0), jitter_size=64)):
        out, changed = augment(image, empty, torch.Generator().manual_seed(0))
        assert changed["boxes"].shape == (0, 4)
        assert changed["masks"].shape == (0, *out.shape[1:])


def test_fitted_size():
    assert fitted_size((480, 640), 800, 1333) == (800, 1067)
    assert fitted_size((480, 960), 800, 1333) == (666, 1333)
    assert fitted_size((960, 480), 800, 1333) == (1333, 666)
    assert fitted_size((1, 4000), 800, 1333) == (1, 1333)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"short_sides": (800, 480)}, "short_sides"),
        ({"max_side": 700}, "max_side 700"),
        ({"jitter": (2.0, 0.1)}, "jitter"),
        ({"jitter_size": 0}, "jitter_size"),
        ({"flip": 1.5}, "flip: invalid value 1.5"),
    ],
)
def test_numbers_out_of_order(change, message):
    with pytest.raises(ValueError, match=message):
        vs.DetectionAugment(**change)
