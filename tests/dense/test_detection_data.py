"""Data sets in COCO's and VOC's layouts: what is read and mapped, and one clear line for everything that is broken."""

import json
import os

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as reference

import video_swinv2 as vs
from video_swinv2.data.decode import DecodeError
from video_swinv2.dense.detection_dataset import detection_splits, read_detection_data
from video_swinv2.dense.outlines import decode_outline, encode_mask, outline_fault, run_lengths
from video_swinv2.errors import UserError

SIZE = (40, 60)  # height, width


def picture(path, size=SIZE):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)).save(path)


def square(left, top, side):
    return [[left, top, left + side, top, left + side, top + side, left, top + side]]


def crowd_rle(mask):
    """A mask as uncompressed run lengths, computed the plain way."""
    counts, value = [], 0
    for pixel in mask.T.reshape(-1):
        if pixel != value or not counts:
            if not counts and pixel:
                counts.append(0)
            counts.append(0)
            value = pixel
        counts[-1] += 1
    return {"size": list(mask.shape), "counts": counts}


def coco(root, split="train", **changes):
    """Three images: two objects and a crowd, one object of run lengths, nothing. Category ids have gaps."""
    crowd = np.zeros(SIZE, dtype=np.uint8)
    crowd[5:20, 30:50] = 1
    dot = np.zeros(SIZE, dtype=np.uint8)
    dot[0:9, 0:4] = 1
    content = {
        "info": {"year": 2017},
        "images": [
            {"id": 30, "file_name": "c.png", "height": 40, "width": 60, "license": 1},
            {"id": 10, "file_name": "a.png", "height": 40, "width": 60},
            {"id": 20, "file_name": "sub/b.png", "height": 40, "width": 60},
        ],
        "categories": [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}, {"id": 90, "name": "cow"}],
        "annotations": [
            {
                "id": 1,
                "image_id": 10,
                "category_id": 7,
                "bbox": [5, 6, 20, 20],
                "area": 390.5,
                "iscrowd": 0,
                "segmentation": square(5, 6, 20),
            },
            {
                "id": 2,
                "image_id": 10,
                "category_id": 90,
                "bbox": [30, 5, 20, 15],
                "area": 300,
                "iscrowd": 1,
                "segmentation": crowd_rle(crowd),
            },
            {
                "id": 3,
                "image_id": 10,
                "category_id": 3,
                "bbox": [40.5, 20.5, 19.8, 10],
                "segmentation": square(40.5, 20.5, 10),
            },
            {"id": 4, "image_id": 20, "category_id": 3, "bbox": [0, 0, 4, 9], "segmentation": encode_mask(dot)},
        ],
    }
    for image in content["images"]:
        picture(root / f"{split}2017" / image["file_name"])
    path = root / "annotations" / f"instances_{split}2017.json"
    path.parent.mkdir(exist_ok=True)
    for key, change in changes.items():
        change(content[key])
    path.write_text(json.dumps(content))
    return root


def annotation(number, **changes):
    return lambda found: found[number].update(changes)


def voc(root, objects=(("dog", (6, 7, 25, 26), 0), ("cat", (1, 1, 60, 40), 1)), *, size=SIZE, extra=""):
    for name, content in (("one", objects), ("two", ())):
        picture(root / "JPEGImages" / f"{name}.png")
        items = "".join(
            f"<object><name>{label}</name><difficult>{difficult}</difficult><bndbox><xmin>{left}</xmin><ymin>{top}</ymin>"
            f"<xmax>{right}</xmax><ymax>{bottom}</ymax></bndbox></object>"
            for label, (left, top, right, bottom), difficult in content
        )
        path = root / "Annotations" / f"{name}.xml"
        path.parent.mkdir(exist_ok=True)
        sizes = f"<size><width>{size[1]}</width><height>{size[0]}</height><depth>3</depth></size>"
        path.write_text(f"{extra}<annotation><filename>x</filename>{sizes}{items}</annotation>")
    lists = root / "ImageSets" / "Main"
    lists.mkdir(parents=True, exist_ok=True)
    (lists / "train.txt").write_text("one\n")
    (lists / "val.txt").write_text("two\n")
    (lists / "dog_train.txt").write_text("one 1\n")
    return root


def test_coco(tmp_path):
    dataset = vs.DetectionDataset(coco(tmp_path), "train")
    dataset.check()
    assert dataset.classes == ("cat", "dog", "cow")  # by id
    assert dataset.notes == ("instances_train2017.json: category ids from 3 to 90 became labels 1 to 3",)
    assert [path.name for path in dataset.paths] == ["c.png", "a.png", "b.png"]
    image, target = dataset[1]
    assert image.shape == (3, *SIZE)
    assert image.dtype == torch.uint8
    # The crowd is not among the objects; a box that exceeds the image by rounding is clipped.
    assert target["boxes"].tolist() == [[5, 6, 25, 26], [40.5, 20.5, 60, 30.5]]
    assert target["boxes"].dtype == torch.float32
    assert target["labels"].tolist() == [2, 1]
    assert target["area"].tolist() == [390.5, 195]
    assert target["iscrowd"].tolist() == [0, 0]
    assert target["image_id"] == 10
    assert target["masks"].shape == (2, *SIZE)
    assert target["masks"].dtype == torch.uint8
    assert target["masks"][0, 6:26, 5:25].all()
    assert target["masks"][0].sum() == 400
    _, everything = vs.DetectionDataset(tmp_path, "train", ignored=True)[1]
    assert everything["iscrowd"].tolist() == [0, 1, 0]
    assert everything["masks"][1].sum() == 300
    assert everything["masks"][1, 5:20, 30:50].all()
    _, dot = dataset[2]
    assert dot["masks"][0].sum() == dot["masks"][0, :9, :4].sum() == 36
    _, nothing = dataset[0]
    assert nothing["boxes"].shape == (0, 4)
    assert nothing["labels"].shape == (0,)
    assert nothing["masks"].shape == (0, *SIZE)
    assert detection_splits(tmp_path) == ("train",)


def test_the_items_train_a_detector(tmp_path):
    dataset = vs.DetectionDataset(coco(tmp_path), "train", transform=vs.DetectionAugment((32, 64), 96))
    model = vs.create_detector(
        "swinv2_nano", num_classes=3, kind="mask_rcnn", window=4, head_channels=32, fpn_channels=16
    )
    images, targets = zip(*[dataset[place] for place in range(3)], strict=True)
    losses = model(images, targets, resized=True)
    assert all(torch.isfinite(value) for value in losses.values())
    assert losses["loss_mask"] > 0
    torch.manual_seed(3)
    image, target = dataset[1]
    torch.manual_seed(3)
    again, same = dataset[1]
    assert torch.equal(image, again)
    assert torch.equal(target["boxes"], same["boxes"])


def test_classes_of_a_model(tmp_path):
    coco(tmp_path)
    dataset = vs.DetectionDataset(tmp_path, "train", classes=["cow", "horse", "cat", "dog"])
    assert dataset.classes == ("cow", "horse", "cat", "dog")
    assert dataset[1][1]["labels"].tolist() == [4, 3]
    with pytest.raises(
        UserError, match=r"its category 'cat' is not among the 1 classes asked for \(nor are 1 more\); complete"
    ):
        vs.DetectionDataset(tmp_path, "train", classes=["cow"])


def test_other_places_of_coco_files(tmp_path):
    coco(tmp_path)
    os.rename(tmp_path / "train2017", tmp_path / "images")
    assert len(vs.DetectionDataset(tmp_path, "train")) == 3
    beside = tmp_path / "valid"
    os.rename(tmp_path / "images", beside)
    os.rename(tmp_path / "annotations" / "instances_train2017.json", beside / "_annotations.coco.json")
    assert len(vs.DetectionDataset(tmp_path, "val")) == 3
    assert detection_splits(tmp_path) == ("val",)


def test_objects_without_segmentation_give_no_masks(tmp_path):
    dataset = vs.DetectionDataset(coco(tmp_path, annotations=annotation(3, segmentation=[])), "train")
    assert "masks" not in dataset[1][1]
    assert dataset.notes[-1] == "1 of 4 objects have no segmentation, so there are no masks"


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        (
            "annotations",
            annotation(0, bbox=[5, 6, 0, 20]),
            r"annotation 1: the box from \(5, 6\) to \(5, 26\) has no width",
        ),
        (
            "annotations",
            annotation(0, bbox=[5, 6, 70, 20]),
            r"annotation 1: the box from \(5, 6\) to \(75, 26\) is outside the image of 60 x 40",
        ),
        ("annotations", annotation(0, bbox=[-9, 6, 20, 20]), "is outside the image"),
        ("annotations", annotation(0, bbox=[60.2, 6, 0.5, 20]), "lies at the border of the image, outside"),
        ("annotations", annotation(0, bbox=[5, 6, 20]), r"annotations.0.bbox: list should have at least 4 items"),
        ("annotations", annotation(0, bbox=[5, 6, None, 20]), r"annotations.0.bbox.2: input should be a valid number"),
        ("annotations", annotation(0, image_id=11), "annotation 1: there is no image 11"),
        ("annotations", annotation(0, category_id=8), "annotation 1: there is no category 8"),
        (
            "annotations",
            annotation(0, segmentation=[[1, 2, 3, 4]]),
            "its segmentation: a polygon that is no list of three or more",
        ),
        (
            "annotations",
            annotation(0, segmentation=[[1, 2, 3, 4, 5, 1e9]]),
            r"a polygon with the coordinate 1e\+09, far outside",
        ),
        (
            "annotations",
            annotation(1, segmentation={"size": [40, 60], "counts": [5, 6]}),
            "run lengths of 11 pixels, in an image of 2400",
        ),
        (
            "annotations",
            annotation(1, segmentation={"size": [60, 40], "counts": [2400]}),
            r"run lengths for a size of \[60, 40\]",
        ),
        (
            "annotations",
            annotation(1, segmentation={"size": [40, 60], "counts": "\x7f\x7f"}),
            "run lengths with the character",
        ),
        (
            "images",
            lambda images: images[0].update(file_name="gone.png"),
            r"gone.png: no such image, but .*instances_train2017.json lists it",
        ),
        ("images", lambda images: images[0].update(file_name="../../secret"), "is not a path inside"),
        ("images", lambda images: images[0].update(file_name="x" * 300), "no such image"),
        ("images", lambda images: images[0].update(id=10), "two images have the same id"),
        ("images", lambda images: images.clear(), "there is no image 10"),
        ("categories", lambda found: found[0].update(id=3), "two categories have the same id"),
        ("categories", lambda found: found[0].update(name="cat"), "class 'cat' is listed twice"),
        ("categories", lambda found: found.clear(), "has no categories"),
    ],
)
def test_broken_coco(tmp_path, key, change, message):
    coco(tmp_path, **{key: change})
    with pytest.raises(UserError, match=message) as raised:
        vs.DetectionDataset(tmp_path, "train")
    assert "\n" not in str(raised.value)


def test_an_image_of_another_size(tmp_path):
    dataset = vs.DetectionDataset(coco(tmp_path, images=lambda images: images[0].update(height=41)), "train")
    message = r"c.png: is 60 x 40 pixels, but annotated as 60 x 41; correct the annotation"
    with pytest.raises(DecodeError, match=message):
        dataset.check()
    with pytest.raises(DecodeError, match=message):
        dataset[0]
    (tmp_path / "train2017" / "c.png").write_bytes(b"nothing")
    with pytest.raises(DecodeError, match=r"c.png: is not an image"):
        dataset.check()


def test_leaving_out_what_is_faulty(tmp_path):
    def spoil(found):
        for place in (0, 2, 3):
            found[place].update(bbox=[5, 6, 0, 20])

    coco(tmp_path, annotations=spoil)
    with pytest.raises(UserError, match=r"\(and 2 more faults; drop_faulty leaves all of them out\)"):
        vs.DetectionDataset(tmp_path, "train")
    (tmp_path / "train2017" / "c.png").unlink()
    dataset = vs.DetectionDataset(tmp_path, "train", drop_faulty=True)
    assert [path.name for path in dataset.paths] == ["a.png", "b.png"]
    assert len(dataset[0][1]["boxes"]) == 0
    assert len(dataset.notes) == 1 + 3 + 1
    assert dataset.notes[1].startswith("left out: ")
    assert dataset.notes[-1] == "left out: 1 more"


def test_the_fingerprint_follows_the_objects(tmp_path):
    one = read_detection_data(coco(tmp_path), "train").check()
    assert read_detection_data(tmp_path, "train").check() == one
    coco(tmp_path, annotations=annotation(0, bbox=[5, 6, 20, 19]))
    assert read_detection_data(tmp_path, "train").check() != one


def test_voc(tmp_path):
    voc(tmp_path)
    (tmp_path / "JPEGImages" / "one.txt").write_text("something else")
    dataset = vs.DetectionDataset(tmp_path, "train")
    dataset.check()
    assert dataset.classes == ("cat", "dog")
    assert dataset.notes == ("classes from the annotations, in this order: cat, dog",)
    image, target = dataset[0]
    assert image.shape == (3, *SIZE)
    # Pixels count from 1, and the maxima are inside. The difficult object is left out.
    assert target["boxes"].tolist() == [[5, 6, 25, 26]]
    assert target["labels"].tolist() == [2]
    assert target["area"].tolist() == [400]
    _, everything = vs.DetectionDataset(tmp_path, "train", ignored=True)[0]
    assert everything["boxes"].tolist() == [[5, 6, 25, 26], [0, 0, 60, 40]]
    assert everything["iscrowd"].tolist() == [0, 1]
    val = vs.DetectionDataset(tmp_path, "val")
    assert val.classes == ("cat", "dog")  # although no object of this split has one
    assert val[0][1]["boxes"].shape == (0, 4)
    assert detection_splits(tmp_path) == ("train", "val")
    (tmp_path / "classes.txt").write_text("dog\ncat\nhorse\n")
    assert vs.DetectionDataset(tmp_path, "train")[0][1]["labels"].tolist() == [1]


BOMB = """<?xml version="1.0"?><!DOCTYPE lolz [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;&a;&a;">]>"""


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"objects": [("dog", (6, 7, 5, 26), 0)]},
            r"one.xml, object 1: the box from \(5, 6\) to \(5, 26\) has no width",
        ),
        ({"objects": [("dog", (6, 7, 90, 26), 0)]}, "is outside the image of 60 x 40 pixels"),
        ({"objects": [("dog", (6, 7, "nan", 26), 0)]}, "object 1: bndbox/xmax is 'nan', which is no number"),
        ({"objects": [("dog", (6, "", 9, 26), 0)]}, "object 1 has no bndbox/ymin"),
        ({"objects": [("", (6, 7, 9, 26), 0)]}, "object 1 has no name"),
        ({"objects": [("<x>", (6, 7, 9, 26), 0)]}, r"one.xml: not valid XML \(mismatched tag"),
        ({"size": ("-4", 60)}, "invalid size '-4 x 60'"),
        ({"extra": BOMB}, r"has a document type \(DOCTYPE\), which is not read"),
        ({"extra": "<a/>"}, "not valid XML"),
    ],
)
def test_broken_voc(tmp_path, changes, message):
    voc(tmp_path, **changes)
    with pytest.raises(UserError, match=message) as raised:
        vs.DetectionDataset(tmp_path, "train")
    assert "\n" not in str(raised.value)


def test_more_of_broken_voc(tmp_path):
    voc(tmp_path)
    with pytest.raises(UserError, match=r"has no ImageSets/Main/test\.txt; it has the splits train, val"):
        vs.DetectionDataset(tmp_path, "test")
    (tmp_path / "classes.txt").write_text("cat\n")
    with pytest.raises(UserError, match=r"object 1 is a 'dog', which is not among the 1 classes of classes.txt"):
        vs.DetectionDataset(tmp_path, "train")
    (tmp_path / "classes.txt").unlink()
    (tmp_path / "JPEGImages" / "one.png").unlink()
    with pytest.raises(UserError, match=r"one.jpg: no such image"):
        vs.DetectionDataset(tmp_path, "train")
    (tmp_path / "ImageSets" / "Main" / "train.txt").write_text("../../one\n")
    with pytest.raises(UserError, match="is not a path inside"):
        vs.DetectionDataset(tmp_path, "train")
    (tmp_path / "ImageSets" / "Main" / "train.txt").write_text("gone\n")
    with pytest.raises(UserError, match=r"gone.xml: cannot be read"):
        vs.DetectionDataset(tmp_path, "train")
    (tmp_path / "ImageSets" / "Main" / "train.txt").write_text("\n")
    with pytest.raises(UserError, match="the split train has no images"):
        vs.DetectionDataset(tmp_path, "train")


def test_a_size_that_was_not_annotated_is_that_of_the_image(tmp_path):
    dataset = vs.DetectionDataset(voc(tmp_path, size=(0, 0)), "train")
    dataset.check()
    assert dataset.data.size(0) == SIZE


def test_folders_of_other_layouts(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        vs.DetectionDataset(tmp_path / "nothing", "train")
    with pytest.raises(UserError, match=r"has neither annotations/instances_\*.json"):
        vs.DetectionDataset(tmp_path, "train")
    coco(tmp_path)
    with pytest.raises(UserError, match="has no annotations for the split val"):
        vs.DetectionDataset(tmp_path, "val")
    (tmp_path / "annotations" / "instances_train.json").write_text("{}")
    with pytest.raises(UserError, match=r"instances_train.json and instances_train2017.json are both the split train"):
        vs.DetectionDataset(tmp_path, "train")


def test_masks_against_pycocotools():
    """Polygons, run lengths as lists and as texts decode to the masks of pycocotools, and masks encode to its texts."""
    generator = np.random.default_rng(0)
    for _ in range(50):
        height, width = (int(n) for n in generator.integers(1, 70, 2))
        mask = (generator.random((height, width)) < generator.random()).astype(np.uint8)
        expected = reference.encode(np.asfortranarray(mask))
        text = encode_mask(mask)
        assert text["counts"] == expected["counts"].decode()
        assert text["size"] == [height, width]
        assert np.array_equal(decode_outline(text, (height, width)), mask)
        plain = crowd_rle(mask)
        assert run_lengths(text["counts"]) == plain["counts"]
        assert np.array_equal(decode_outline(plain, (height, width)), mask)
        assert outline_fault(text, (height, width)) == outline_fault(plain, (height, width)) == ""
        polygons = [
            (generator.random((n, 2)) * [width, height]).reshape(-1).tolist() for n in generator.integers(3, 8, 2)
        ]
        expected = reference.decode(reference.merge(reference.frPyObjects(polygons, height, width)))
        assert outline_fault(polygons, (height, width)) == ""
        assert np.array_equal(decode_outline(polygons, (height, width)), expected)


def test_run_lengths_of_another_total_are_never_decoded(tmp_path):
    """The libraries would write beyond their arrays."""
    assert (
        outline_fault({"size": [2, 2], "counts": [0, 10**9]}, (2, 2))
        == "run lengths of 1000000000 pixels, in an image of 4"
    )
    assert "no whole numbers" in outline_fault({"size": [2, 2], "counts": [5, -1]}, (2, 2))
    assert "no list or text" in outline_fault({"size": [2, 2], "counts": None}, (2, 2))
    assert "middle of a number" in outline_fault({"size": [2, 2], "counts": "P"}, (2, 2))
    assert "character" in outline_fault({"size": [2, 2], "counts": "o" * 100}, (2, 2))
    assert outline_fault(7, (2, 2)) == "neither a list of polygons nor run lengths"
    assert "coordinate" in outline_fault([[1, 2, 3, 4, 5, float("nan")]], (2, 2))
