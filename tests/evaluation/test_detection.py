"""The test of a detector: figures against pycocotools on the files themselves, two processes, views, and faults."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

import video_swinv2 as vs
from tests.dense.small import save_small_detector
from tests.training.resume_worker import Ranks
from video_swinv2.cli import main
from video_swinv2.data.images import read_image
from video_swinv2.dense.outlines import coco_masks
from video_swinv2.evaluation.detection import run_detection_test
from video_swinv2.models.preprocessing import Preprocessing

IMAGES = 5
IDS = {"cat": 7, "dog": 3}  # of the data set, whose order is not that of the model
CLASSES = ("cat", "cow", "dog")  # of the model; the data has no cow


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_small_detector(tmp_path / "model.safetensors", CLASSES)


@pytest.fixture
def data(tmp_path: Path, model: Path) -> Path:
    """Noise of several sizes in COCO's layout, whose objects are some of what the model finds."""
    root, rng = tmp_path / "data", np.random.default_rng(0)
    for folder in ("test", "annotations"):
        (root / folder).mkdir(parents=True)
    content: dict[str, list[Any]] = {
        "images": [], "annotations": [], "categories": [{"id": number, "name": name} for name, number in IDS.items()]
    }  # fmt: skip
    detector = vs.load_model(model)
    for number in range(IMAGES):
        height, width = 40 + 4 * number, 60
        pixels = rng.integers(0, 255, (height, width, 3), dtype=np.uint8)
        image = root / "test" / f"{number}.jpg"
        Image.fromarray(pixels).save(image)
        identity = 100 - number
        content["images"].append({"id": identity, "file_name": image.name, "height": height, "width": width})
        with torch.no_grad():
            found = detector([read_image(image)])[0]
        for place in range(0, min(len(found["labels"]), 12), 3):
            name = CLASSES[found["labels"][place] - 1]
            left, top, right, bottom = found["boxes"][place].round().tolist()
            if name == "cow" or right <= left or bottom <= top:
                continue
            outline = [[left, top, right, top, right, bottom, left, bottom]]
            content["annotations"].append(
                {"id": len(content["annotations"]) + 1, "image_id": identity, "category_id": IDS[name], "iscrowd": 0,
                 "bbox": [left, top, right - left, bottom - top], "area": (right - left) * (bottom - top),
                 "segmentation": outline}
            )  # fmt: skip
    assert {item["category_id"] for item in content["annotations"]} == {3, 7}
    (root / "annotations/instances_test.json").write_text(json.dumps(content))
    return root


def run_test(model: Path, data: Path, out: Path) -> None:
    sys.exit(main(["test", str(model), str(data), "--out", str(out)]))


def pycocotools(data: Path, results: Path, kind: str) -> list[float]:
    """The figures of a results file by pycocotools, from the files alone."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(data / "annotations/instances_test.json"))
        found = json.loads(results.read_text())
        unwanted = "bbox" if kind == "segm" else "segmentation"
        evaluation = COCOeval(
            truth, truth.loadRes([{k: v for k, v in item.items() if k != unwanted} for item in found]), kind
        )
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats.tolist()  # type: ignore[no-any-return]


def test_figures_are_those_of_pycocotools_on_one_process_and_on_two(model: Path, data: Path, tmp_path: Path) -> None:
    one = run_detection_test(model, data, out=tmp_path / "one")
    names = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large",
             "ar1", "ar10", "ar100", "ar_small", "ar_medium", "ar_large")  # fmt: skip
    detections = json.loads((tmp_path / "one" / "detections.json").read_text())
    assert {item["category_id"] for item in detections} == {3, 7}, "the data set's own numbers, and no cow"
    assert {item["image_id"] for item in detections} <= {100, 99, 98, 97, 96}
    masks = coco_masks()
    for item in detections:
        size = [40 + 4 * (100 - item["image_id"]), 60]
        assert list(masks.decode(item["segmentation"]).shape) == size
    for kind, name in (("boxes", "bbox"), ("masks", "segm")):
        expected = pycocotools(data, tmp_path / "one" / "detections.json", name)
        for key, value in zip(names, expected, strict=True):
            if value == -1:  # nothing to find
                assert np.isnan(one[kind][key])
            else:
                assert one[kind][key] == pytest.approx(value, abs=1e-9), (kind, key)
        low, high = one[kind]["intervals"]["ap"]
        assert low <= one[kind]["ap"] <= high
    assert one["boxes"]["ap"] > 0
    by_class = {row["class"]: row for row in one["per_class"]}
    assert np.isnan(by_class["cow"]["boxes"]["ap"])
    means = [by_class[name]["boxes"]["ap"] for name in IDS]
    assert np.mean(means) == pytest.approx(one["boxes"]["ap"])
    assert one["images"] == {"listed": IMAGES, "scored": IMAGES, "failed": 0}
    page = (tmp_path / "one" / "report.html").read_text()
    assert f"{100 * one['boxes']['ap']:.1f}<small> % AP of boxes" in page
    for kind in ("boxes", "masks"):
        for name in IDS:
            assert f"{100 * by_class[name][kind]['ap']:.1f} %" in page[page.index("<h2>Classes") :]
    log = tmp_path / "two.log"
    assert Ranks(2, run_test, model, data, tmp_path / "two", log=log).wait() == [0, 0], log.read_text()[-3000:]
    two = json.loads((tmp_path / "two" / "results.json").read_text())
    assert two["processes"] == 2
    assert (tmp_path / "two" / "detections.json").read_bytes() == (tmp_path / "one" / "detections.json").read_bytes()
    for key in ("boxes", "masks", "per_class", "per_image"):
        assert two[key] == json.loads((tmp_path / "one" / "results.json").read_text())[key]
    assert "boxes: AP" in log.read_text()


def test_mistakes_are_counted_and_shown(model: Path, data: Path, tmp_path: Path) -> None:
    """Objects that nothing looks like are missed, and sure detections without an object are wrong."""
    path = data / "annotations/instances_test.json"
    content = json.loads(path.read_text())
    corner = {"bbox": [0, 0, 2, 2], "area": 4, "segmentation": [[0, 0, 2, 0, 2, 2, 0, 2]], "iscrowd": 0}
    content["annotations"] = [corner | {"id": 1, "image_id": 98, "category_id": 7}]
    path.write_text(json.dumps(content))
    result = run_detection_test(model, data, out=tmp_path / "t")
    assert result["boxes"]["ap"] == 0
    assert [image["missed"] for image in result["per_image"]] == [0, 0, 1, 0, 0]
    assert [image["image_id"] for image in result["per_image"]] == [100, 99, 98, 97, 96]
    for image in result["per_image"]:
        assert image["sure_but_wrong"] == image["sure"] <= image["detections"]
    assert sum(image["sure"] for image in result["per_image"]) > 0
    page = (tmp_path / "t" / "report.html").read_text()
    assert "Surest wrong detections" in page
    assert "Most missed objects" in page
    sheet = np.array(Image.open(tmp_path / "t" / "missed.png"))
    assert sheet.shape[:2] == (280, 2 * 350)  # an image of 48 x 60 pixels, twice
    assert (sheet[:, :350] == (230, 30, 30)).all(axis=2).any(), "the missed object is red"


def test_a_report_is_rebuilt_and_not_compared(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_detection_test(model, data, out=tmp_path / "t")
    page = tmp_path / "t" / "report.html"
    written = page.read_text()
    page.unlink()
    assert main(["report", str(tmp_path / "t")]) == 0
    assert page.read_text() == written
    assert capsys.readouterr().out.strip() == str(page)
    assert main(["report", str(tmp_path / "t"), str(tmp_path / "t")]) == 2
    assert "a test of detection cannot be compared" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "t"), "--run", str(tmp_path)]) == 2
    assert "is not for a test of detection" in capsys.readouterr().err


def test_views_and_suppression_make_a_test_of_their_own(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["test", str(model), str(data), "--out", str(tmp_path / "t")]
    assert main(arguments) == 0
    plain = json.loads((tmp_path / "t" / "results.json").read_text())
    assert main([*arguments, "detection.soft_nms=true"]) == 2
    assert "holds the result of another test, of different protocol_numbers" in capsys.readouterr().err
    arguments[-1] = str(tmp_path / "u")
    settings = ["detection.soft_nms=true", "detection.test_sides=[32, 48]", "detection.test_flip=true"]
    assert main([*arguments, *settings]) == 0
    numbers = json.loads((tmp_path / "u" / "results.json").read_text())["protocol_numbers"]
    assert numbers["suppression"]["soft"] is True
    assert [tuple(view.values()) for view in numbers["views"]] == [
        (32, 53, False), (32, 53, True), (48, 80, False), (48, 80, True)
    ]  # fmt: skip
    assert [tuple(view.values()) for view in plain["protocol_numbers"]["views"]] == [(48, 80, False)]
    assert (tmp_path / "u" / "detections.json").read_bytes() != (tmp_path / "t" / "detections.json").read_bytes()
    assert main([*arguments, "--protocol", "whole"]) == 2
    assert "--protocol: is not for detectors" in capsys.readouterr().err


def test_an_unreadable_image_is_named_and_its_objects_are_missed(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = run_detection_test(model, data, out=tmp_path / "a")
    path = data / "test/2.jpg"
    path.write_bytes(path.read_bytes()[:700])  # the header is whole, so the check before the test passes
    broken = run_detection_test(model, data, out=tmp_path / "b")
    assert broken["images"]["failed"] == 1
    assert "2.jpg" in capsys.readouterr().err
    image = broken["per_image"][2]
    assert image["missed"] == image["objects"] > 0
    assert image["detections"] == 0
    assert broken["boxes"]["ar100"] < whole["boxes"]["ar100"]


def test_data_that_does_not_fit_is_refused(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = data / "annotations/instances_test.json"
    whole = path.read_text()
    content = json.loads(whole)
    content["annotations"][0]["bbox"][2] = 0
    path.write_text(json.dumps(content))
    arguments = ["test", str(model), str(data), "--out", str(tmp_path / "faulty")]
    assert main(arguments) == 2
    assert "has no width or no height" in capsys.readouterr().err
    assert main([*arguments, "detection.drop_faulty=true"]) == 0
    assert "test: left out: " in capsys.readouterr().err
    path.write_text(whole.replace('"dog"', '"horse"'))
    assert main(["test", str(model), str(data), "--out", str(tmp_path / "t")]) == 2
    assert "its category 'horse' is not among the 3 classes" in capsys.readouterr().err
    classifier = tmp_path / "classifier.safetensors"
    vs.save_model(vs.create_model("swinv2_nano", num_classes=2, image_size=32, window=4), classifier, classes="ab")
    assert main(["test", str(classifier), str(data), "--out", str(tmp_path / "t"), "detection.soft_nms=true"]) == 2
    assert "detection.soft_nms: is for detectors, and this is a classifier" in capsys.readouterr().err


def test_a_detector_that_finds_nothing_in_data_without_masks(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "voc"
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    Image.new("RGB", (60, 40)).save(root / "JPEGImages/a.jpg")
    box = "<bndbox><xmin>5</xmin><ymin>5</ymin><xmax>30</xmax><ymax>30</ymax></bndbox>"
    size = "<size><width>60</width><height>40</height></size>"
    (root / "Annotations/a.xml").write_text(f"<annotation>{size}<object><name>dog</name>{box}</object></annotation>")
    (root / "ImageSets/Main/test.txt").write_text("a\n")
    detector = vs.load_model(model)
    with torch.no_grad():
        detector.roi_heads.stages[0].box_predictor.cls_score.bias[0] = 1e4  # of the background
    sure = tmp_path / "sure.safetensors"
    vs.save_model(detector, sure, classes=CLASSES, preprocessing=Preprocessing(None, 1, (48, 80)))
    assert main(["test", str(sure), str(root), "--out", str(tmp_path / "t")]) == 0
    said = capsys.readouterr()
    assert "so boxes alone are compared" in said.err
    assert "boxes: AP 0.0 %" in said.out
    result = json.loads((tmp_path / "t" / "results.json").read_text())
    assert result["boxes"]["ap"] == 0
    assert result["per_image"][0]["missed"] == 1
    assert "masks" not in result
    assert json.loads((tmp_path / "t" / "detections.json").read_text()) == []
    assert (tmp_path / "t" / "missed.png").is_file()
    assert not (tmp_path / "t" / "mistakes.png").exists()
