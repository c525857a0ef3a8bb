"""Data sets of masks: the layouts, and one line for everything that is wrong with them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from video_swinv2.dense.segmentation_data import (
    CITYSCAPES,
    SegmentationDataset,
    read_segmentation_data,
    segmentation_splits,
)
from video_swinv2.dense.segmentation_transforms import SegmentationAugment
from video_swinv2.errors import UserError

SIZE = (6, 8)


def write_image(path: Path, shade: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", SIZE[::-1], (shade, 0, 0)).save(path)
    return path


def write_mask(path: Path, values: np.ndarray | int = 0, palette: bool = False) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.broadcast_to(np.asarray(values, dtype=np.uint8), SIZE)
    image = Image.fromarray(np.ascontiguousarray(pixels))
    if palette:
        image = image.convert("P")
        image.putdata(pixels.flatten().tolist())
    image.save(path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four images of three classes in lists; in the mask of image i, the first row is class i, the rest 255."""
    for i in range(4):
        write_image(tmp_path / "images" / f"{i}.png", 50 * i)
        values = np.full(SIZE, 255)
        values[0] = i % 3
        write_mask(tmp_path / "masks" / f"{i}.png", values, palette=i == 3)
    (tmp_path / "classes.txt").write_text("road\nsky\ntree\n")
    (tmp_path / "train.txt").write_text("2\n0.png\n\n")
    (tmp_path / "val.txt").write_text("3\n")
    return tmp_path


def test_a_folder_with_lists(folder: Path) -> None:
    dataset = SegmentationDataset(folder, "train")
    dataset.check()
    assert segmentation_splits(folder) == ("train", "val")
    assert dataset.classes == ("road", "sky", "tree")
    assert [path.name for path in dataset.paths] == ["2.png", "0.png"]
    image, mask = dataset[0]
    assert (image.dtype, image.shape, int(image[0, 0, 0])) == (torch.uint8, (3, *SIZE), 100)
    assert (mask.dtype, mask[0].unique().tolist(), mask[1:].unique().tolist()) == (torch.int64, [2], [255])
    assert SegmentationDataset(folder, "val")[0][1][0].unique().tolist() == [0]  # the indices of a palette
    augmented = SegmentationDataset(folder, "train", transform=SegmentationAugment((4, 5)))[1]
    assert (augmented[0].shape, augmented[1].shape) == ((3, 4, 5), (4, 5))


def test_without_lists_all_images_are_for_training(folder: Path) -> None:
    for split in ("train", "val"):
        (folder / f"{split}.txt").unlink()
    assert segmentation_splits(folder) == ("train",)
    assert len(SegmentationDataset(folder, "train")) == 4


def test_ade20k(tmp_path: Path) -> None:
    for split, names in (("training", "ab"), ("validation", "c")):
        for name in names:
            write_image(tmp_path / "images" / split / f"{name}.jpg")
            write_mask(tmp_path / "annotations" / split / f"{name}.png", np.array([[0], [1], [2], [3], [0], [255]]))
    rows = ["Idx\tRatio\tTrain\tVal\tStuff\tName"]
    rows += [f"{i}\t0.1\t1\t1\t0\t{name}" for i, name in enumerate(("wall", "building, edifice", "sky"), 1)]
    (tmp_path / "objectInfo150.txt").write_text("\n".join(rows) + "\n")
    dataset = SegmentationDataset(tmp_path, "train", reduce_zero_label=True)
    dataset.check()
    assert segmentation_splits(tmp_path) == ("train", "val")
    assert dataset.classes == ("wall", "building, edifice", "sky")
    assert (len(dataset), len(SegmentationDataset(tmp_path, "val", reduce_zero_label=True))) == (2, 1)
    assert dataset[0][1][:, 0].tolist() == [255, 0, 1, 2, 255, 255]
    with pytest.raises(UserError, match=r"index 3, but the 3 classes of objectInfo150.txt end at 2; "):
        SegmentationDataset(tmp_path, "train").check()


@pytest.mark.parametrize("kind", ["labelTrainIds", "labelIds"])
def test_cityscapes(tmp_path: Path, kind: str) -> None:
    write_image(tmp_path / "leftImg8bit/val/ulm/ulm_0_1_leftImg8bit.png")
    values = [0, 1, 18, 255, 2, 3] if kind == "labelTrainIds" else [7, 8, 33, 0, 11, 12]
    write_mask(tmp_path / f"gtFine/val/ulm/ulm_0_1_gtFine_{kind}.png", np.array(values)[:, None])
    dataset = SegmentationDataset(tmp_path, "val")
    dataset.check()
    assert dataset.classes == tuple(CITYSCAPES)
    assert len(dataset.classes) == 19
    assert dataset[0][1][:, 0].tolist() == [0, 1, 18, 255, 2, 3]
    assert segmentation_splits(tmp_path) == ("val",)


def other_size(folder: Path) -> None:
    Image.new("L", (3, 3)).save(folder / "masks/0.png")


def colours(folder: Path) -> None:
    Image.new("RGB", SIZE[::-1]).save(folder / "masks/0.png")


def sixteen_bits(folder: Path) -> None:
    Image.fromarray(np.zeros(SIZE, dtype=np.uint16)).save(folder / "masks/0.png")


def one_bit(folder: Path) -> None:
    Image.new("1", SIZE[::-1]).save(folder / "masks/0.png")


def jpeg(folder: Path) -> None:
    Image.new("L", SIZE[::-1]).save(folder / "masks/0.png", format="JPEG")


def truncated(folder: Path) -> None:
    path = folder / "masks/0.png"
    path.write_bytes(path.read_bytes()[:50])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (other_size, "masks/0.png: is 3 x 3 pixels, but its image 0.png is 8 x 6"),
        (lambda folder: write_mask(folder / "masks/0.png", 3), "masks/0.png: has pixels of index 3, but the 3 classes"),
        (lambda folder: (folder / "classes.txt").write_text("road\nsky\n"), "has pixels of index 2, but the 2 classes"),
        (lambda folder: (folder / "masks/0.png").unlink(), "masks/0.png: is missing, the mask of 0.png"),
        (lambda folder: (folder / "images/0.png").unlink(), "images/0.png: is missing, the image of 0.png"),
        (lambda folder: (folder / "classes.txt").unlink(), "classes.txt: is missing"),
        (lambda folder: (folder / "classes.txt").write_text("\n"), "classes.txt: names 0 classes"),
        (lambda folder: (folder / "classes.txt").write_text("a\na\n"), "class 'a' is listed twice"),
        (lambda folder: shutil.rmtree(folder / "masks"), "has no folders images and masks"),
        (lambda folder: (folder / "train.txt").unlink(), "has no list train.txt; it has the splits val"),
        (lambda folder: (folder / "train.txt").write_text(""), "its split train has no images"),
        (lambda folder: (folder / "images/0.png").write_bytes(b"no"), "images/0.png: is not an image that is read"),
        (colours, "masks/0.png: is not an index PNG but in colours"),
        (sixteen_bits, "masks/0.png: is not an index PNG but 16-bit grey"),
        (one_bit, "masks/0.png: is not an index PNG but 1-bit grey"),
        (jpeg, "masks/0.png: is not a PNG"),
        (truncated, "masks/0.png: not a readable PNG"),
    ],
)
def test_what_is_wrong_is_one_line(folder: Path, damage: Callable[[Path], object], message: str) -> None:
    read_segmentation_data(folder, "train").check()
    damage(folder)
    with pytest.raises(UserError) as fault:
        SegmentationDataset(folder, "train").check()
    assert message in str(fault.value)
    assert "\n" not in str(fault.value)


def test_an_unknown_index_can_be_declared_no_class(folder: Path) -> None:
    write_mask(folder / "masks/0.png", 7)
    dataset = SegmentationDataset(folder, "train", ignore_index=7)
    dataset.check()
    assert dataset[1][1].unique().tolist() == [255]


def test_masks_are_checked_on_access_too(folder: Path) -> None:
    dataset = SegmentationDataset(folder, "train")
    other_size(folder)
    with pytest.raises(UserError, match="is 3 x 3 pixels"):
        dataset[1]
    (folder / "masks/0.png").unlink()
    with pytest.raises(UserError, match="cannot be read"):
        dataset[1]


def test_a_mask_without_an_image_is_named(folder: Path) -> None:
    for split in ("train", "val"):
        (folder / f"{split}.txt").unlink()
    write_mask(folder / "masks/9.png")
    with pytest.raises(UserError, match=r"masks/9.png: a mask without an image"):
        SegmentationDataset(folder, "train")


def test_the_fingerprint_tells_data_apart(folder: Path) -> None:
    first = read_segmentation_data(folder, "train").check()
    assert read_segmentation_data(folder, "train").check() == first
    assert read_segmentation_data(folder, "train", ignore_index=1).check() != first
    write_mask(folder / "masks/0.png", 1)
    assert read_segmentation_data(folder, "train").check() != first


def test_a_turned_image_has_the_size_that_it_is_shown_at(folder: Path) -> None:
    image, exif = Image.new("RGB", SIZE), Image.Exif()  # as stored, width and height have changed places
    exif[0x0112] = 6
    image.save(folder / "images/0.png", exif=exif)
    dataset = SegmentationDataset(folder, "train")
    dataset.check()
    assert dataset[1][0].shape == (3, *SIZE)


def test_camvid(outside_data: Path) -> None:
    data = read_segmentation_data(outside_data / "camvid", "val", ignore_index=11)
    data.check()
    assert (len(data.entries), len(data.classes)) == (124, 11)
    with pytest.raises(UserError, match=r"index 11, but the 11 classes of classes.txt end at 10"):
        read_segmentation_data(outside_data / "camvid", "val").check()
