"""Detectors against torchvision's, image by image, and their model files."""

import copy
import dataclasses

import pytest
import torch
from torch import nn
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.ops import MultiScaleRoIAlign, box_iou

import video_swinv2 as vs
from tests.closeness import assert_close, assert_same
from video_swinv2.dense.cascade import CascadeHeads
from video_swinv2.dense.detection_transforms import resize
from video_swinv2.dense.detection_views import View
from video_swinv2.dense.detectors import KINDS
from video_swinv2.dense.proposals import ExactAnchors
from video_swinv2.dense.suppression import Suppression
from video_swinv2.errors import UserError
from video_swinv2.weights import store

SMALL = {
    "window": 4,
    "head_channels": 64,
    "fpn_channels": 32,
    "mask_channels": 16,
    "proposals": 100,
    "anchor_sizes": (8, 16, 32, 64, 128),
}


def detector(kind="faster_rcnn", num_classes=3, **changes):
    return vs.create_detector(
        "swinv2_nano", num_classes=num_classes, kind=kind, **{"short_side": 64, "max_side": 128, **SMALL, **changes}
    )


def target(*boxes, size, labels=None):
    """A target whose masks are the left half of each box."""
    masks = torch.zeros(len(boxes), *size, dtype=torch.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes, strict=True):
        mask[top:bottom, left : (left + right) // 2] = 1
    return {
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        "labels": torch.tensor(labels or [1 + place % 3 for place in range(len(boxes))], dtype=torch.int64),
        "masks": masks,
    }


def pictures():
    images = [torch.rand(3, 61, 90), torch.rand(3, 64, 64), torch.rand(3, 100, 77)]
    targets = [
        target((10, 10, 50, 55), (40, 20, 80, 60), size=(61, 90)),
        target(size=(64, 64)),  # nothing in it
        target((5, 30, 70, 95), size=(100, 77)),
    ]
    return images, targets


def maps(channels=8, size=64):
    """A pyramid as the feature pyramid network gives it, for an image of size x size."""
    return {
        str(level): torch.randn(1, channels, size // 2 ** (level + 2), size // 2 ** (level + 2)) for level in range(4)
    }


def torchvision_heads(ours: CascadeHeads, class_agnostic: bool) -> RoIHeads:
    """torchvision's `RoIHeads` with the modules of a cascade of one stage, and a predictor with its weights."""
    stage = ours.stages[0]
    predictor = FastRCNNPredictor(32, 4)
    repeats = 4 if class_agnostic else 1
    with torch.no_grad():
        predictor.cls_score.load_state_dict(stage.box_predictor.cls_score.state_dict())
        predictor.bbox_pred.weight.copy_(stage.box_predictor.bbox_pred.weight.repeat(repeats, 1))
        predictor.bbox_pred.bias.copy_(stage.box_predictor.bbox_pred.bias.repeat(repeats))
    names = ["0", "1", "2", "3"]
    return RoIHeads(
        MultiScaleRoIAlign(names, 7, 2),
        stage.box_head,
        predictor,
        fg_iou_thresh=0.5,
        bg_iou_thresh=0.5,
        batch_size_per_image=16,
        positive_fraction=0.25,
        bbox_reg_weights=None,
        score_thresh=0.05,
        nms_thresh=0.5,
        detections_per_img=100,
        mask_roi_pool=MultiScaleRoIAlign(names, 14, 2),
        mask_head=ours.mask_head,
        mask_predictor=ours.mask_predictor,
    )


@pytest.mark.parametrize("class_agnostic", [False, True])
def test_a_cascade_of_one_stage_is_the_head_of_torchvision(class_agnostic, monkeypatch):
    ours = CascadeHeads(8, 32, 3, stages=1, mask_channels=8, strides=(4, 8, 16, 32), sampled_boxes=16)
    if class_agnostic:
        from video_swinv2.dense.cascade import BoxPredictor

        ours.stages[0].box_predictor = BoxPredictor(32, 3, class_agnostic=True)
    theirs = torchvision_heads(ours, class_agnostic)
    features, size = maps(), (64, 64)
    corner = torch.rand(50, 2) * 40
    proposals = torch.cat((corner, corner + 4 + torch.rand(50, 2) * 20), dim=1)
    truth = target((10, 10, 50, 55), (40, 20, 60, 60), size=size)

    torch.manual_seed(0)
    _, losses = ours(features, proposals, size, truth)
    torch.manual_seed(0)
    _, expected = theirs(features, [proposals], [size], [truth])
    assert losses.keys() == expected.keys() == {"loss_classifier", "loss_box_reg", "loss_mask"}
    for name, value in losses.items():
        assert torch.equal(value, expected[name]), name
        assert value > 0, name

    with torch.no_grad():
        found, _ = ours.eval()(features, proposals, size)
        (expected,), _ = theirs.eval()(features, [proposals], [size])
    assert len(found["boxes"]) > 10
    for name in ("boxes", "labels", "scores", "masks"):
        assert torch.equal(found[name], expected[name]), name


class _OurMaps(nn.Module):
    """The backbone and the feature pyramid network of a detector, as torchvision's detectors take a backbone."""

    def __init__(self, ours):
        super().__init__()
        self.ours, self.out_channels = ours, ours.design.fpn_channels

    def forward(self, pixels):
        return self.ours._maps(pixels)


@pytest.mark.parametrize("kind", ["faster_rcnn", "mask_rcnn"])
def test_a_detector_is_that_of_torchvision(kind):
    """Whole detectors with the same weights, on an image of multiples of 64, where torchvision is exact."""
    ours = detector(kind).eval()
    theirs = {"faster_rcnn": FasterRCNN, "mask_rcnn": MaskRCNN}[kind](
        _OurMaps(ours),
        min_size=64,
        max_size=128,
        rpn_anchor_generator=AnchorGenerator(tuple((s,) for s in SMALL["anchor_sizes"]), ((0.5, 1.0, 2.0),) * 5),
        rpn_pre_nms_top_n_train=200,
        rpn_pre_nms_top_n_test=100,
        rpn_post_nms_top_n_train=200,
        rpn_post_nms_top_n_test=100,
        box_head=ours.roi_heads.stages[0].box_head,
        box_predictor=ours.roi_heads.stages[0].box_predictor,
        rpn_head=ours.rpn.head,
        **(
            {"mask_head": ours.roi_heads.mask_head, "mask_predictor": ours.roi_heads.mask_predictor}
            if kind == "mask_rcnn"
            else {}
        ),
    ).eval()
    with torch.no_grad():
        ours.rpn.head.bbox_pred.weight.mul_(20)  # so that proposals differ from anchors
    image = torch.rand(3, 64, 128)
    truth = target((10, 10, 50, 55), (40, 20, 120, 60), size=(64, 128))
    with torch.no_grad():
        (found,), (expected,) = ours([image]), theirs([image])
    assert found.keys() == expected.keys()
    assert len(found["boxes"]) == 100
    for name in found:
        assert_close(found[name], expected[name], name=name)
    ours.train()
    theirs.train()
    theirs.transform._skip_resize = True  # it draws a size, which would change what is drawn later
    torch.manual_seed(0)
    losses = ours([image], [truth])
    torch.manual_seed(0)
    expected = theirs([image], [truth])
    assert losses.keys() == expected.keys()
    for name, value in losses.items():
        assert_close(value, expected[name], name=name)


@pytest.mark.parametrize("kind", KINDS)
def test_images_do_not_depend_on_each_other(kind):
    """Images of different sizes give together what each gives alone: detections, and the mean of the losses."""
    model = detector(kind)
    images, targets = pictures()
    together = model(images, targets, seeds=[7, 8, 9])
    alone = [
        model([image], [truth], seeds=[seed]) for image, truth, seed in zip(images, targets, (7, 8, 9), strict=True)
    ]
    for name, value in together.items():
        assert_close(value, sum(losses[name] for losses in alone) / 3, name=name)
    model.eval()
    with torch.no_grad():
        found = model(images)
        for number, image in enumerate(images):
            assert_same(found[number], model([image])[0])
            if model.design.has_masks:
                assert found[number]["masks"].shape == (len(found[number]["boxes"]), 1, *image.shape[1:])


def test_every_parameter_has_a_gradient_even_without_boxes():
    model = detector("cascade_mask_rcnn")
    losses = model([torch.rand(3, 64, 64)], [target(size=(64, 64))])
    assert set(losses) == {"loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg", "loss_mask"}
    sum(losses.values()).backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_boxes_come_back_in_pixels_of_the_image_as_given():
    model = detector(short_side=64, max_side=128).eval()
    image = torch.rand(3, 96, 150)
    shown, _ = resize(image, {}, (64, 100))
    with torch.no_grad():
        found, inside = model([image])[0], model([shown], resized=True)[0]
        assert_same(found | {"boxes": inside["boxes"]}, inside)
        assert_close(found["boxes"], inside["boxes"] * 1.5)
        as_is = model([image], resized=True)[0]
    assert as_is["boxes"].max() <= 150
    assert not torch.equal(as_is["scores"], found["scores"])


def test_uint8_pixels_are_those_divided_by_255():
    model = detector().eval()
    image = torch.randint(256, (3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        assert_same(model([image])[0], model([image / 255])[0])


def test_anchors_of_a_size_that_is_no_multiple_of_the_stride():
    anchors = ExactAnchors((32, 64), (4, 8))
    grids = [torch.zeros(1, 1, 26, 33, dtype=torch.bfloat16), torch.zeros(1, 1, 13, 17, dtype=torch.bfloat16)]
    (found,) = anchors(ImageList(torch.zeros(1, 3, 101, 130), [(101, 130)]), grids)
    centres = (found[:, :2] + found[:, 2:]) / 2
    assert found.dtype == torch.float32
    first = centres[: 26 * 33 * 3].reshape(26, 33, 3, 2)
    assert torch.equal(first[25, 32], torch.tensor([[128.0, 100.0]] * 3))
    second = centres[26 * 33 * 3 :].reshape(13, 17, 3, 2)
    assert torch.equal(second[12, 16], torch.tensor([[128.0, 96.0]] * 3))


def test_small_images_are_read_at_the_true_strides():
    """The first image that a detector sees, however small, does not decide how it reads the following ones."""
    model = detector().eval()
    other = copy.deepcopy(model)
    image = torch.rand(3, 64, 96)
    with torch.no_grad():
        other([torch.rand(3, 33, 33)], resized=True)
        assert_same(other([image])[0], model([image])[0])
        assert model.roi_heads.stages[0].box_roi_pool.scales == [1 / 4, 1 / 8, 1 / 16, 1 / 32]


def test_boxes_are_float32_under_autocast():
    """torchvision would round coordinates to bf16: a box at 801 to 803 would be at 800 to 804."""
    model = detector("mask_rcnn", short_side=64, max_side=1333)
    with torch.no_grad():
        model.rpn.head.bbox_pred.weight.zero_()
        for stage in model.roi_heads.stages:
            stage.box_predictor.bbox_pred.weight.zero_()
            stage.box_predictor.bbox_pred.bias.copy_(torch.tensor([0.1, 0.0, 0.0, 0.0] * 4))
    image = torch.rand(3, 64, 1216)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        (found,) = model.eval()([image])
    assert {tensor.dtype for tensor in found.values()} == {torch.float32, torch.int64}
    inside = found["boxes"][(found["boxes"][:, 0] > 700) & (found["boxes"][:, 2] < 1215)]
    assert len(inside)
    # Anchors have whole or half coordinates, which the deltas move by 0.01 of their sides; bf16 has steps of 4 here.
    assert (inside[:, 0] != inside[:, 0].bfloat16().float()).all()
    losses = model.train()([image], [target((700, 10, 751, 55), size=(64, 1216))])
    assert all(torch.isfinite(value) for value in losses.values())


def test_the_stages_of_a_cascade():
    """Detections of three stages, computed here step by step: mean scores, and boxes refined by each stage."""
    heads = CascadeHeads(8, 32, 3, stages=3, mask_channels=None, strides=(4, 8, 16, 32), sampled_boxes=16).eval()
    heads.suppression = Suppression(min_score=0.0, max_overlap=1.0, max_detections=10**6)
    features, size = maps(), (64, 64)
    corner = torch.rand(20, 2) * 40
    proposals = torch.cat((corner, corner + 4 + torch.rand(20, 2) * 20), dim=1)
    with torch.no_grad():
        for stage in heads.stages:
            stage.box_predictor.bbox_pred.bias.uniform_(-3, 3)
        found, _ = heads(features, proposals, size)
        boxes, scores = proposals, []
        for stage, scale in zip(heads.stages, (10, 20, 30), strict=True):
            hidden = stage.box_head(stage.box_roi_pool(features, [boxes], [size]))
            scores.append(stage.box_predictor.cls_score(hidden).softmax(dim=1))
            dx, dy, dw, dh = (
                stage.box_predictor.bbox_pred(hidden) / torch.tensor([scale, scale, scale / 2, scale / 2])
            ).T
            sides = boxes[:, 2:] - boxes[:, :2]
            centres = boxes[:, :2] + sides / 2 + torch.stack((dx, dy), dim=1) * sides
            sides = sides * torch.stack((dw, dh), dim=1).exp()
            boxes = torch.cat((centres - sides / 2, centres + sides / 2), dim=1).clamp(0, 64)
    mean = (scores[0] + scores[1] + scores[2]) / 3
    assert len(found["boxes"]) == 20 * 3
    for box, label, score in zip(found["boxes"], found["labels"], found["scores"], strict=True):
        row = int((boxes - box).abs().sum(dim=1).argmin())
        assert_close(box, boxes[row])
        assert_close(score, mean[row, label])
    assert heads.loss_weights == [1.0, 0.5, 0.25]
    assert [stage.proposal_matcher.high_threshold for stage in heads.stages] == [0.5, 0.6, 0.7]


def test_later_stages_require_a_higher_overlap():
    """A box with an IoU of 0.55 is a positive of the first stage, and background for the second."""
    heads = CascadeHeads(8, 32, 1, stages=2, mask_channels=None, strides=(4, 8, 16, 32), sampled_boxes=16)
    with torch.no_grad():
        for stage in heads.stages:
            stage.box_predictor.bbox_pred.weight.zero_()  # boxes stay where they are
            stage.box_predictor.cls_score.weight.zero_()
            stage.box_predictor.cls_score.bias.copy_(torch.tensor([0.0, 5.0]))  # everything looks like an object
    truth = target((0, 0, 20, 20), size=(64, 64), labels=[1])
    box = torch.tensor([[0.0, 0.0, 20.0, 11.0]])  # IoU 0.55
    _, losses = heads(maps(), box, (64, 64), truth)
    # Both boxes, the proposal and the true box, are objects for the first stage; the proposal is none for the second.
    right, wrong = nn.functional.softplus(torch.tensor(-5.0)), nn.functional.softplus(torch.tensor(5.0))
    assert_close(losses["loss_classifier"], right + 0.5 * (right + wrong) / 2)


@pytest.mark.parametrize("kind", KINDS)
def test_model_files(kind, tmp_path):
    model = detector(kind).eval()
    model.classes = ("cat", "dog", "cow")
    vs.save_model(model, tmp_path / "detector.safetensors", provenance={"run": "test"})
    loaded = vs.load_model(tmp_path / "detector.safetensors")
    assert isinstance(loaded, vs.Detector)
    assert loaded.design == model.design
    assert loaded.classes == ("cat", "dog", "cow")
    assert not loaded.training
    assert loaded.encoder.preprocessing.mean == (0.485, 0.456, 0.406)
    images, _ = pictures()
    with torch.no_grad():
        for found, expected in zip(loaded(images), model(images), strict=True):
            assert_same(found, expected)
    card = vs.read_card(tmp_path / "detector.safetensors")
    assert card.dense["task"] == "detection"
    assert card.dense["kind"] == kind
    # Another window at test time changes no weight, and keeps the normaliser.
    wide = vs.load_model(tmp_path / "detector.safetensors", window=16)
    assert wide.encoder.window == (16, 16)
    assert wide.encoder.cpb_norm == model.encoder.cpb_norm
    assert_same(wide.state_dict(), model.state_dict())


def test_model_files_that_do_not_fit(tmp_path):
    path = tmp_path / "detector.safetensors"
    model = detector()
    with pytest.raises(UserError, match="2 class names for a head of 3"):
        vs.save_model(model, path, classes=["a", "b"])
    vs.save_model(model, path)
    with pytest.raises(UserError, match=r"a model for detection, not a classifier; load it with vs\.load_model"):
        store.load_model(path)
    with pytest.raises(UserError, match="omit frames and image_size"):
        vs.load_model(path, image_size=64)
    with pytest.raises(ValueError, match="2 names for 3 classes"):
        model.classes = ("a", "b")
    tensors, metadata = store.read_tensors(path)
    for damage, message in (
        ('"kind": "faster_rcnn"', "kind: 'yolo' is not one of"),
        ('"head_channels": 64', "dense: head_channels: input should be less than"),
        ('"task": "detection"', "dense.task: unknown task 'flying'"),
    ):
        changed = {'"kind": "faster_rcnn"': '"kind": "yolo"', '"head_channels": 64': '"head_channels": 99999999'}
        card = metadata[store.CARD_KEY].replace(damage, changed.get(damage, '"task": "flying"'))
        assert card != metadata[store.CARD_KEY]
        store.save_file(tensors, path, metadata={**metadata, store.CARD_KEY: card})
        with pytest.raises(UserError, match=message):
            vs.load_model(path)


def test_weights_of_other_models(tmp_path):
    """The encoder starts from a classifier, and a detector's file starts the encoders of other models."""
    classifier = vs.create_model("swinv2_nano", num_classes=5, image_size=64, window=4)
    vs.save_model(classifier, tmp_path / "classifier.safetensors")
    model = detector()
    account = vs.load_weights(model.encoder, tmp_path / "classifier.safetensors")
    assert account.unused.keys() == {"norm.weight", "norm.bias", "head.weight", "head.bias"}
    expected = classifier.state_dict()
    assert_same(model.encoder.state_dict(), {name: expected[name] for name in model.encoder.state_dict()})
    assert model.encoder.cpb_norm == classifier.cpb_norm

    vs.save_model(model, tmp_path / "detector.safetensors")
    fresh = vs.create_model("swinv2_nano", num_classes=5, image_size=64, window=4)
    account = vs.load_weights(fresh, tmp_path / "detector.safetensors")
    assert account.initialised.keys() == {"norm.weight", "norm.bias", "head.weight", "head.bias"}
    assert account.unused["rpn.head.cls_logits.weight"] == "belongs to the heads of a dense task"
    assert_same(
        {n: t for n, t in fresh.state_dict().items() if n in model.encoder.state_dict()}, model.encoder.state_dict()
    )


def test_weights_of_a_pretraining(tmp_path):
    """The encoder of a SimMIM file, with its normaliser, in a detector with another window."""
    encoder = vs.create_model("swinv2_nano", image_size=64, window=8)
    vs.save_model(vs.SimMIM(encoder, 32), tmp_path / "simmim.safetensors")
    model = detector(window=4)
    account = vs.load_weights(model.encoder, tmp_path / "simmim.safetensors")
    assert not account.initialised
    assert {"mask_token", "decoder.0.weight", "norm.weight"} <= account.unused.keys()
    expected = encoder.state_dict()
    assert_same(model.encoder.state_dict(), {name: expected[name] for name in model.encoder.state_dict()})
    assert model.encoder.cpb_norm == [(8, 8), (8, 8), (4, 4), (2, 2)]
    assert model.encoder.window == (4, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"boxes": torch.tensor([[10.0, 10.0, 10.0, 50.0]])},
            r"targets\[0\]: box \[10.0, 10.0, 10.0, 50.0\] has no width",
        ),
        ({"boxes": torch.tensor([[0.0, 0.0, float("nan"), 50.0]])}, "has no width"),
        ({"labels": torch.tensor([4])}, "labels from 4 to 4, but the detector has classes 1 to 3"),
        ({"labels": torch.tensor([0])}, "labels from 0 to 0"),
        ({"labels": torch.tensor([1, 2])}, r"labels \(2,\)"),
        (
            {"masks": torch.zeros(1, 10, 10, dtype=torch.uint8)},
            r"masks \(1, 10, 10\) for 1 boxes in an image of \(64, 64\)",
        ),
    ],
)
def test_targets_that_training_cannot_use(change, message):
    truth = target((10, 10, 50, 50), size=(64, 64)) | change
    with pytest.raises(ValueError, match=message):
        detector("mask_rcnn")([torch.rand(3, 64, 64)], [truth])


def test_other_misuse():
    model = detector("mask_rcnn")
    image = torch.rand(3, 64, 64)
    with pytest.raises(ValueError, match="targets: none, which training needs"):
        model([image])
    with pytest.raises(ValueError, match="has no 'masks'; a mask_rcnn needs it"):
        model([image], [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}])
    with pytest.raises(ValueError, match=r"images\[0\]: shape \(1, 64, 64\)"):
        model.eval()([image[:1]])
    with pytest.raises(ValueError, match="kind: 'ssd' is not one of faster_rcnn, mask_rcnn"):
        detector("ssd")
    with pytest.raises(ValueError, match="anchor_sizes: 2 of them; give 5"):
        detector(anchor_sizes=(8, 16))
    with pytest.raises(ValueError, match="short_side: 64 is more than max_side, 32"):
        detector(max_side=32)
    with pytest.raises(ValueError, match="did you mean 'swinv2_nano'"):
        vs.create_detector("swinv2_nanno", num_classes=3)
    assert dataclasses.asdict(model.design)["kind"] == "mask_rcnn"


@pytest.mark.parametrize("kind", ["faster_rcnn", pytest.param("cascade_mask_rcnn", marks=pytest.mark.slow)])
def test_overfitting_one_batch(kind):
    """The loss of one batch falls below 5 % of its start."""
    model = detector(kind, short_side=48, sampled_boxes=32, sampled_anchors=64, proposals=50)
    images, targets = pictures()
    images, targets = images[::2], targets[::2]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    history = []
    for step in range(300):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1.0, (step + 1) / 20)
        loss = sum(model(images, targets, seeds=[1, 2]).values())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        history.append(float(loss.detach()))
        if history[-1] < 0.05 * history[0]:
            break
    assert history[-1] < 0.05 * history[0], history[::20]


def test_views_of_an_image():
    """A mirrored view sees the mirrored image, and its boxes and masks come back as those of the image itself."""
    model = detector("mask_rcnn").eval()
    image = torch.rand(3, 64, 96)
    with torch.no_grad():
        mirrored = model.detect(image.flip(-1), [View(64, 128)])
        found = model.detect(image, [View(64, 128, flip=True)])
    left, top, right, bottom = mirrored["boxes"].unbind(1)
    assert_close(found["boxes"], torch.stack((96 - right, top, 96 - left, bottom), dim=1))
    assert_close(found["scores"], mirrored["scores"])
    assert_close(found["masks"], mirrored["masks"].flip(-1))


def test_boxes_of_several_views_compete():
    model = detector("mask_rcnn").eval()
    model.suppression = Suppression(max_detections=20)
    image = torch.rand(3, 64, 96)
    views = [View(side, 128, mirrored) for side in (48, 64) for mirrored in (False, True)]
    assert views == [View(48, 128), View(48, 128, True), View(64, 128), View(64, 128, True)]
    with torch.no_grad():
        found = model.detect(image, views)
        alone = [model.detect(image, [view]) for view in views]
        assert_same(model.detect(image, [View(64, 128)]), model.detect(image))
    assert found["masks"].shape == (20, 1, 28, 28)
    best = max(float(one["scores"][0]) for one in alone)
    assert float(found["scores"][0]) == best
    pairs = box_iou(found["boxes"], found["boxes"]) - torch.eye(20)
    same = found["labels"][:, None] == found["labels"][None]
    assert (pairs[same] <= 0.5).all()
    origins = {tuple(box) for one in alone for box in one["boxes"].tolist()}
    assert len(origins & {tuple(box) for box in found["boxes"].tolist()}) > 10
