"""Masks of images from the command line: shares in words, PNGs that data sets read, and pictures with a legend."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image

import video_swinv2 as vs
from tests.dense.small import write_two_images
from video_swinv2.cli import main
from video_swinv2.dense.segmentation_pictures import class_colours, colour_map, overlay_with_legend
from video_swinv2.errors import UserError
from video_swinv2.inference.export import export
from video_swinv2.models.preprocessing import Preprocessing


@pytest.fixture
def model(tmp_path: Path) -> Path:
    made = vs.create_segmenter("swinv2_nano", num_classes=3, image_size=32, window=4, channels=64)
    torch.nn.init.normal_(made.head.classifier.weight)
    path = tmp_path / "model.safetensors"
    vs.save_model(made, path, classes=["road", "sky", "tree"], preprocessing=Preprocessing(None, 1, (32, 32)))
    return path


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return write_two_images(tmp_path / "images", (30, 44))


def test_masks_and_pictures_are_written(model: Path, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = images.parent / "out"
    assert main(["predict", str(model), str(images), "--json", "--pictures", str(out)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [Path(each["path"]).name for each in found] == ["0.png", "1.png"]
    # The masks are masks of a data set.
    (images.parent / "masks").mkdir()
    for each in found:
        Path(each["mask"]).rename(images.parent / "masks" / Path(each["path"]).name)
    (images.parent / "classes.txt").write_text("road\nsky\ntree\n")
    dataset = vs.SegmentationDataset(images.parent, "train")
    dataset.check()
    for place, each in enumerate(found):
        mask = dataset[place][1]
        for k, name in enumerate(dataset.classes):
            assert each["shares"].get(name, 0) == pytest.approx(float((mask == k).float().mean()))
        assert list(each["shares"].values()) == sorted(each["shares"].values(), reverse=True)
        with Image.open(each["picture"]) as picture:
            assert picture.width > 44
            assert picture.height >= 30
    shown = Image.open(images.parent / "masks" / "0.png").convert("RGB")
    expected = colour_map(dataset[0][1], 3)
    assert torch.equal(torch.from_numpy(np.array(shown)).permute(2, 0, 1), expected)


def test_words_tables_and_faults(model: Path, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (images / "2.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    assert main(["predict", str(model), str(images), "--top", "1"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert lines[0].endswith(" %")
    assert "2.png: " in lines[2]
    assert main(["predict", str(model), str(images), "--csv"]) == 1
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert sum(float(row["share"]) for row in rows if row["path"].endswith("0.png")) == pytest.approx(1, abs=1e-5)
    assert rows[-1]["error"]
    assert main(["predict", str(model), str(images), "--explain", str(images.parent / "x")]) == 2
    assert "--explain: is for classifiers" in capsys.readouterr().err


def test_a_segmenter_is_exported_to_onnx(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "model.onnx"
    found = export(model, out, image_size=(48, 64))
    assert found.difference < 1e-4
    session = onnxruntime.InferenceSession(out, providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape[1:] == [3, 48, 64]
    images = torch.randn(2, 3, 48, 64)
    with torch.no_grad():
        expected = vs.load_model(model)(images)
    logits = torch.from_numpy(session.run(None, {"pixels": images.numpy()})[0])
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
    description = json.loads(session.get_modelmeta().custom_metadata_map["video_swinv2"])
    assert (description["classes"], description["output"]) == (
        ["road", "sky", "tree"],
        "logits (batch, classes, H, W) float32",
    )
    with pytest.raises(UserError, match="omit frames"):
        export(model, tmp_path / "b.onnx", frames=4)


def test_a_legend_has_the_largest_class_first_and_colours_differ() -> None:
    colours = class_colours(150)
    assert len({tuple(colour) for colour in colours.tolist()}) == 150
    mask = torch.zeros(40, 60, dtype=torch.uint8)
    mask[:10] = 2
    image = torch.full((3, 40, 60), 255, dtype=torch.uint8)
    sheet = np.array(overlay_with_legend(image, mask, ["road", "a very long name of a class that is cut", "sky"]))
    squares = [tuple(pixel) for pixel in sheet[:, 60 + 7].tolist() if pixel != [255, 255, 255]]
    assert list(dict.fromkeys(squares)) == [tuple(class_colours(3)[0].tolist()), tuple(class_colours(3)[2].tolist())]
