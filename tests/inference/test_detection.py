"""Objects in images from the command line: the detector's own boxes in words, as JSON and CSV, and in pictures."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import video_swinv2 as vs
from tests.dense.small import save_small_detector, write_two_images
from tests.training.resume_worker import Ranks
from video_swinv2.cli import main
from video_swinv2.data.images import read_image
from video_swinv2.dense.detection_pictures import LONGEST, detections_picture
from video_swinv2.dense.outlines import decode_outline

SIZE = (40, 60)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_small_detector(tmp_path / "model.safetensors", ["cat", "=dog"])


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return write_two_images(tmp_path / "images", SIZE)


def test_objects_are_those_of_the_model_and_are_drawn(
    model: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = images.parent / "out"
    arguments = ["predict", str(model), str(images), "--json", "--pictures", str(out), "--min-score", "0.2"]
    assert main(arguments) == 0
    found = json.loads(capsys.readouterr().out)
    detector = vs.load_model(model)
    assert [Path(each["path"]).name for each in found] == ["0.png", "1.png"]
    assert any(each["objects"] for each in found)
    for each in found:
        image = read_image(Path(each["path"]))
        with torch.no_grad():
            expected = detector([image])[0]
        kept = expected["scores"] >= 0.2
        assert 0 < int(kept.sum()) < len(kept)
        objects = each["objects"]
        assert [item["name"] for item in objects] == [["cat", "=dog"][k - 1] for k in expected["labels"][kept]]
        assert torch.allclose(torch.tensor([item["score"] for item in objects]), expected["scores"][kept])
        assert torch.allclose(torch.tensor([item["box"] for item in objects]), expected["boxes"][kept])
        for item, mask in zip(objects, expected["masks"][kept, 0] > 0.5, strict=True):
            assert np.array_equal(decode_outline(item["mask"], SIZE), mask.numpy())
        with Image.open(each["picture"]) as picture:
            assert picture.size == (60, 40)
            assert np.abs(np.array(picture).astype(int) - image.permute(1, 2, 0).numpy()).max() > 100


def write_objects(model: Path, images: Path, out: Path) -> None:
    with contextlib.redirect_stdout(io.StringIO()) as said:
        code = main(["predict", str(model), str(images), "--json", "--min-score", "0"])
    if said.getvalue():
        out.write_text(said.getvalue())
    sys.exit(code)


def test_two_processes_share_the_images_and_one_prints_all(
    model: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (images / "2.png").write_bytes(b"no image")
    assert main(["predict", str(model), str(images), "--json", "--min-score", "0"]) == 1
    alone = json.loads(capsys.readouterr().out)
    out, log = tmp_path / "found.json", tmp_path / "log"
    assert Ranks(2, write_objects, model, images, out, log=log).wait() == [1, 1], log.read_text()[-3000:]
    assert json.loads(out.read_text()) == alone
    assert [bool(each["error"]) for each in alone] == [False, False, True]


def test_words_tables_and_faults(model: Path, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (images / "2.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    assert main(["predict", str(model), str(images), "--top", "1", "--min-score", "0"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert " more" in lines[0]
    assert "2.png: " in lines[2]
    assert main(["predict", str(model), str(images / "0.png"), "--min-score", "1"]) == 0
    assert capsys.readouterr().out.strip().endswith("0.png: nothing found")
    assert main(["predict", str(model), str(images), "--csv", "--min-score", "0"]) == 1
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert {row["class"] for row in rows[:-1]} <= {"cat", "'=dog"}, "no formula for a spreadsheet"
    assert float(rows[0]["x2"]) > float(rows[0]["x1"])
    assert rows[-1]["error"]
    for option in (["--protocol", "whole"], ["--explain", "x"]):
        assert main(["predict", str(model), str(images), *option]) == 2
        assert f"{option[0]}: is for classifiers; omit it for a detector" in capsys.readouterr().err


def test_a_large_image_is_shown_smaller_with_its_boxes_in_place() -> None:
    image = torch.full((3, 1600, 2560), 255, dtype=torch.uint8)
    found = {
        "boxes": torch.tensor([[200.0, 400, 1000, 1200]]),
        "labels": torch.tensor([1]),
        "scores": torch.tensor([0.9]),
        "masks": torch.ones(1, 1, 28, 28),
    }
    picture = detections_picture(image, found, ["cat"])
    assert picture.shape == (3, 800, LONGEST)
    coloured = (picture != 255).any(dim=0)
    assert coloured[220:590, 120:490].all()
    assert not coloured[:, 520:].any()
    assert not coloured[620:].any()
