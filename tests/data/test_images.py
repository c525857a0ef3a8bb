"""Image files are read as shown or refused in one line; folders are listed once and the index is never out of date."""

import itertools
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from video_swinv2.config import DataConfig
from video_swinv2.data import collection, images, index
from video_swinv2.data.decode import DecodeError
from video_swinv2.data.images import image_tree, read_image
from video_swinv2.data.sources import labelled_manifest, labelled_splits, unlabelled_mixture
from video_swinv2.errors import UsageError, UserError

RAMP = np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)  # all greys, of which 8 bits are value / 257


def pixels(path):
    """(H, W, 3) uint8."""
    return read_image(path).permute(1, 2, 0).numpy()


def write_png16(path, samples, colour):
    """Write (H, W, C) uint16 as a PNG of 16 bits per sample, which Pillow can do only in grey."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", samples.shape[1], samples.shape[0], 16, colour, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


def test_exif_orientation_is_applied(tmp_path):
    upright = np.zeros((16, 32, 3), dtype=np.uint8)
    upright[:8, :8] = 255  # upper left
    for code, corner in {1: (0, 0), 3: (8, 24), 6: (0, 8), 8: (24, 0)}.items():
        image = Image.fromarray(upright)
        exif = image.getexif()
        exif[0x0112] = code
        image.save(tmp_path / f"{code}.png", exif=exif)
        shown = pixels(tmp_path / f"{code}.png")
        assert shown.shape[:2] == ((16, 32) if code in (1, 3) else (32, 16))
        assert shown[corner[0] + 1, corner[1] + 1, 0] == 255
        assert shown.sum() == upright.sum()
    (tmp_path / "odd.png").write_bytes((tmp_path / "6.png").read_bytes().replace(b"II*\0", b"I?*\0", 1))
    assert pixels(tmp_path / "odd.png").shape in ((16, 32, 3), (32, 16, 3))  # invalid EXIF data turns nothing


def test_sixteen_bits_are_scaled_to_eight_not_clipped(tmp_path):
    want = np.round(RAMP / 257.0)
    for name in ("grey.png", "grey.tif"):
        Image.fromarray(RAMP).save(tmp_path / name)
        assert (pixels(tmp_path / name) == want[:, :, None]).all(), name
    rgb = np.stack([RAMP, RAMP[::-1], RAMP.T], axis=2)
    write_png16(tmp_path / "rgb.png", rgb, colour=2)
    assert np.abs(pixels(tmp_path / "rgb.png").astype(int) - rgb / 257.0).max() < 1  # Pillow takes the upper byte
    opaque = np.stack([RAMP, np.full_like(RAMP, 65535)], axis=2)
    write_png16(tmp_path / "alpha.png", opaque, colour=4)
    assert np.abs(pixels(tmp_path / "alpha.png")[:, :, 0].astype(int) - RAMP / 257.0).max() < 1


def test_transparent_pixels_are_composited_on_white(tmp_path):
    half = Image.new("LA", (4, 4), (0, 128))
    half.save(tmp_path / "grey.png")
    assert (pixels(tmp_path / "grey.png") == 127).all()
    colour = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    colour.putpixel((0, 0), (255, 0, 0, 255))
    colour.save(tmp_path / "colour.png")
    assert pixels(tmp_path / "colour.png")[0, :2].tolist() == [[255, 0, 0], [255, 255, 255]]
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([9, 9, 9, 0, 0, 200])
    palette.putpixel((1, 0), 0)
    palette.save(tmp_path / "palette.png", transparency=bytes([0, 255]))
    assert pixels(tmp_path / "palette.png")[0, :2].tolist() == [[0, 0, 200], [255, 255, 255]]
    palette.save(tmp_path / "plain.png")
    assert pixels(tmp_path / "plain.png")[0, :2].tolist() == [[0, 0, 200], [9, 9, 9]]
    key = Image.new("RGB", (4, 4), (1, 2, 3))
    key.save(tmp_path / "key.png", transparency=(1, 2, 3))
    assert (pixels(tmp_path / "key.png") == 255).all()


def test_other_formats_are_read(tmp_path):
    Image.new("CMYK", (6, 5), (0, 255, 255, 0)).save(tmp_path / "cmyk.jpg", quality=95)
    assert np.abs(pixels(tmp_path / "cmyk.jpg").astype(int) - [255, 0, 0]).max() < 8
    bits = Image.new("1", (6, 5), 1)
    bits.putpixel((0, 0), 0)
    bits.save(tmp_path / "bits.png")
    assert pixels(tmp_path / "bits.png")[0, :2].tolist() == [[0, 0, 0], [255, 255, 255]]
    stills = [Image.new("RGB", (6, 5), colour) for colour in ("blue", "lime")]
    stills[0].save(tmp_path / "moving.gif", save_all=True, append_images=stills[1:])
    assert pixels(tmp_path / "moving.gif").reshape(-1, 3).tolist() == [[0, 0, 255]] * 30  # the first picture
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    for name, icc in (("lab.png", profile), ("broken.png", b"no profile at all")):
        Image.new("RGB", (6, 5), (10, 200, 30)).save(tmp_path / name, icc_profile=icc)
        assert pixels(tmp_path / name)[0, 0].tolist() == [10, 200, 30]  # as stored, as torchvision and timm read it


def test_unreadable_images_are_refused_in_one_line(tmp_path, monkeypatch, recwarn):
    Image.effect_noise((64, 64), 50).convert("RGB").save(tmp_path / "good.jpg")
    good = (tmp_path / "good.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(good[: len(good) // 2])
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "text.jpg").write_bytes(b"<html>no such image</html>")
    (tmp_path / "folder.jpg").mkdir()
    Image.new("F", (4, 4)).save(tmp_path / "float.tif")
    words = {
        "cut.jpg": "not a readable image",
        "empty.jpg": r"is empty \(0 bytes\)",
        "text.jpg": "not an image that is read",
        "folder.jpg": "not a readable image",
        "float.tif": "no agreed range",
        "absent.jpg": "no such file",
    }
    for name, fault in words.items():
        with pytest.raises(DecodeError, match=rf"{name}: .*{fault}") as caught:
            read_image(tmp_path / name)
        assert "\n" not in str(caught.value)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3000)
    assert read_image(tmp_path / "good.jpg").shape == (3, 64, 64)  # over the limit, but not by twice: no warning either
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(DecodeError, match="decompression bomb"):
        read_image(tmp_path / "good.jpg")
    assert not recwarn


def tree(root, names):
    """Small images of these names, each of a different colour."""
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (number % 256, 0, 0)).save(root / name)
    return root


def names(entries):
    return [entry.name for entry in entries]


def data(source):
    return DataConfig(source=str(source), image_size=32)


def test_the_index_follows_the_folder(tmp_path, cache, monkeypatch):
    """A tree is listed once; after that only folders that changed are, and changes of every kind are noticed."""
    root = tree(tmp_path / "tree", ["a/1.png", "a/2.JPEG", "b/deep/3.png", "b/.hidden.png", ".git/4.png"])
    (root / "b" / "note.txt").write_text("no image")
    listed = []
    real = images._list_folder
    monkeypatch.setattr(
        images, "_list_folder", lambda path, folder, stamp: listed.append(folder) or real(path, folder, stamp)
    )

    def look():
        listed.clear()
        found = image_tree(root)
        return names(found.entries("all")), list(dict.fromkeys(listed))

    assert look() == (["a/1.png", "a/2.JPEG", "b/deep/3.png"], ["", "a", "b", "b/deep"])
    assert look()[1] == []
    tree(root, ["b/deep/0.png"])
    assert look() == (["a/1.png", "a/2.JPEG", "b/deep/0.png", "b/deep/3.png"], ["b/deep"])
    (root / "a" / "1.png").rename(root / "b" / "1.png")
    assert look() == (["a/2.JPEG", "b/1.png", "b/deep/0.png", "b/deep/3.png"], ["a", "b"])
    times = (root / "a").stat()
    (root / "a" / "2.JPEG").rename(root / "a" / "5.JPEG")
    os.utime(root / "a", ns=(times.st_atime_ns, times.st_mtime_ns))  # a change that sets its time back
    assert look() == (["a/5.JPEG", "b/1.png", "b/deep/0.png", "b/deep/3.png"], ["a"])
    tree(root, ["c/9.png"])
    assert look()[1] == ["", "c"]
    for path in (root / "b" / "deep").iterdir():
        path.unlink()
    (root / "b" / "deep").rmdir()
    assert look() == (["a/5.JPEG", "b/1.png", "c/9.png"], ["b"])
    (saved,) = (path for path in (cache / "video-swinv2" / "index").iterdir() if path.suffix != ".lock")
    saved.write_bytes(saved.read_bytes()[:100])  # a damaged index is replaced
    assert look() == (["a/5.JPEG", "b/1.png", "c/9.png"], ["", "a", "b", "c"])
    assert look()[1] == []


def test_a_folder_that_changed_just_now_is_not_trusted(tmp_path, monkeypatch):
    """On a coarse clock it may change again without its time changing, and a file would never be found."""
    monkeypatch.setattr(index, "SETTLED_SECONDS", 2.0)
    root = tree(tmp_path / "tree", ["a/1.png"])
    image_tree(root)
    times = index.change_stamp(root / "a")
    tree(root, ["a/2.png"])
    assert times == index.UNSETTLED
    assert names(image_tree(root).entries("all")) == ["a/1.png", "a/2.png"]


def test_an_index_that_cannot_be_saved_is_made_each_time(tmp_path, monkeypatch, capsys):
    root = tree(tmp_path / "tree", ["a/1.png"])
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert names(image_tree(root).entries("all")) == ["a/1.png"]
    assert f"{root} is listed again at every start" in capsys.readouterr().err


def test_a_link_to_a_parent_folder_is_not_followed_forever(tmp_path):
    root = tree(tmp_path / "tree", ["a/1.png"])
    (root / "a" / "up").symlink_to(root)
    elsewhere = tree(tmp_path / "elsewhere", ["2.png"])
    (root / "b").symlink_to(elsewhere)
    (root / "a" / "gone.png").symlink_to(tmp_path / "gone.png")
    assert names(image_tree(root).entries("all")) == ["a/1.png", "a/gone.png", "b/2.png"]


def test_imagenets_layout(tmp_path):
    root = tree(
        tmp_path / "in", [f"{s}/{c}/{i}.JPEG" for s in ("train", "val") for c in ("n02", "n01") for i in range(2)]
    )
    train, val = labelled_manifest(data(root), "train"), labelled_manifest(data(root), "val")
    assert train.classes == val.classes == ("n01", "n02")
    assert [(e.name, e.label) for e in val.entries] == [
        ("val/n01/0.JPEG", 0),
        ("val/n01/1.JPEG", 0),
        ("val/n02/0.JPEG", 1),
        ("val/n02/1.JPEG", 1),
    ]
    assert train.entries[0].path == root / "train" / "n01" / "0.JPEG"
    assert labelled_splits(data(root)) == ("train", "val", "all")
    assert [e.label for e in labelled_manifest(data(root), "val", ["n02", "n03", "n01"]).entries] == [2, 2, 0, 0]
    with pytest.raises(UsageError, match="label 'n02' is not one of the 1 classes"):
        labelled_manifest(data(root), "val", ["n01"])
    (root / "classes.txt").write_text("n02\nn01\n")
    assert labelled_manifest(data(root), "val").classes == ("n02", "n01")
    assert [e.label for e in labelled_manifest(data(root), "val").entries] == [1, 1, 0, 0]
    assert len({train.fingerprint, val.fingerprint, labelled_manifest(data(root), "train").fingerprint}) == 3
    (root / "val" / "n03").mkdir()
    with pytest.raises(UsageError, match="val/n03: a class folder without images"):
        labelled_manifest(data(root), "val")


def test_a_test_folder_of_images_is_never_trained_on(tmp_path):
    root = tree(tmp_path / "in", ["train/a/1.png", "train/a/2.png", "test/3.png", "val/a/4.png"])
    for validation, want in ((False, ["train/a/1.png", "train/a/2.png"]), (True, ["val/a/4.png"])):
        mixture = unlabelled_mixture(data(root), validation)
        assert [mixture[i].entry.name for i in range(len(mixture))] == want
    with pytest.raises(UsageError, match="must not name the test split"):
        unlabelled_mixture(DataConfig(source=str(root), image_size=32, train_split="all"), validation=False)
    with pytest.raises(UsageError, match=r"3\.png: has no label"):
        labelled_manifest(data(root), "test")
    tree(root, ["more/5.png"])
    with pytest.raises(UsageError, match="more: images outside the split folders"):
        unlabelled_mixture(data(root), validation=False)


def test_folders_named_by_number_are_class_indices(tmp_path):
    """As in ImageNet-V2, whose folders sorted by name are 0 1 10 2."""
    root = tree(tmp_path / "v2", [f"{number}/x.jpeg" for number in (0, 1, 2, 10)])
    classes = [f"n{number:02}" for number in range(11)]
    assert [e.label for e in labelled_manifest(data(root), "all", classes).entries] == [0, 1, 10, 2]
    assert [e.label for e in labelled_manifest(data(root), "all").entries] == [0, 1, 2, 3]
    with pytest.raises(UsageError, match="label 10 is out of range for 10 classes"):
        labelled_manifest(data(root), "all", classes[:10])


def test_supervised_and_unsupervised_runs_hold_out_the_same_images_per_class(tmp_path):
    sizes = {"a": 40, "b": 26, "c": 2, "d": 1}
    root = tree(tmp_path / "tree", [f"{name}/{i}.png" for name, size in sizes.items() for i in range(size)])
    val = labelled_manifest(data(root), "val")
    train = labelled_manifest(data(root), "train")
    assert [sum(e.label == label for e in val.entries) for label in range(4)] == [2, 1, 1, 0]
    assert not set(names(val.entries)) & set(names(train.entries))
    assert len(val.entries) + len(train.entries) == 69
    held = unlabelled_mixture(data(root), validation=True)
    assert [held[i].entry.name for i in range(len(held))] == names(val.entries)
    kept = set(names(val.entries))
    tree(root, ["b/new.png", "a/new.png"])  # a new image changes at most one of those held out
    assert len(kept - set(names(labelled_manifest(data(root), "val").entries))) <= 1


def test_held_out_is_a_fair_draw():
    groups = np.repeat(np.arange(100, dtype=np.int32), 400)
    hashes = index.name_hashes(f"{i}".encode() for i in range(len(groups)))
    chosen = collection.held_out(groups, hashes)
    assert (np.bincount(groups[chosen]) == 20).all()
    assert abs(np.flatnonzero(chosen).mean() / len(groups) - 0.5) < 0.02


def test_flat_folders_have_no_labels(tmp_path):
    root = tree(tmp_path / "flat", [f"{i}.png" for i in range(40)])
    assert (
        len(unlabelled_mixture(data(root), validation=False)),
        len(unlabelled_mixture(data(root), validation=True)),
    ) == (38, 2)
    with pytest.raises(UsageError, match=r"\.png: has no label; move it into a class folder"):
        labelled_manifest(data(root), "train")
    with pytest.raises(UsageError, match="no split 'test'; available: train, val, all"):
        labelled_manifest(data(root), "test")


def test_an_unreadable_folder_is_named(tmp_path, monkeypatch):
    root = tree(tmp_path / "tree", ["a/1.png", "b/2.png"])
    real = os.scandir

    def refuse(path):
        if os.path.basename(path) == "b":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", refuse)  # file permissions would not stop root
    with pytest.raises(UserError, match=r"tree/b: cannot be read \(Permission denied\)"):
        image_tree(root)


def test_real_photographs(outside_data):
    photos = outside_data / "images"
    train, val = labelled_manifest(data(photos), "train"), labelled_manifest(data(photos), "val")
    assert (len(train.classes), len(train.entries), len(val.entries)) == (102, 2550, 102)
    for entry in itertools.islice(val.entries, 0, None, 10):
        assert read_image(entry.path).shape[0] == 3


def test_formats_that_start_other_programs_are_not_read(tmp_path):
    (tmp_path / "a.jpg").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"
    )
    with pytest.raises(DecodeError, match="is not an image that is read") as error:
        read_image(tmp_path / "a.jpg")
    assert error.value.reason == "not_image"
