"""Samples: functions of their address, the same with any number of workers; broken files are replaced and named."""

import numpy as np
import pytest
import torch
from PIL import Image

from tests.data.test_decode import write_thin_video
from video_swinv2.config import AugmentConfig, DataConfig, MaskConfig
from video_swinv2.data import decoders
from video_swinv2.data.datasets import UNREADABLE_LABEL, SampleDataset, collate
from video_swinv2.data.loading import StepSampler, plan_batch, training_loader, validation_loader
from video_swinv2.data.manifest import Entry, read_manifest
from video_swinv2.data.sources import labelled_manifest, unlabelled_mixture
from video_swinv2.errors import UsageError, UserError

AUGMENT = AugmentConfig(crop_area=(0.3, 1.0), rand_augment=1)


@pytest.fixture
def clips(tmp_path, write_video):
    """Six videos of two classes in two splits; the grey identifies the video, the row of the white bar the frame."""
    lines = []
    for i in range(6):
        frames = np.full((12, 48, 64, 3), 20 * i, dtype=np.uint8)
        for t in range(12):
            frames[t, 4 * t : 4 * t + 4] = 255
        write_video(tmp_path / f"clip {i}.mp4", frames)
        lines.append(f"clip {i}.mp4 {i % 2}")
    for split in ("train", "val"):
        (tmp_path / f"{split}.txt").write_text("\n".join(lines) + "\n")
    (tmp_path / "classes.txt").write_text("even\nodd\n")
    return tmp_path


def config(folder, **changes):
    return DataConfig(
        **({"source": str(folder), "image_size": 32, "frames": 4, "frame_stride": 2, "workers": 0} | changes)
    )


def dataset(folder, augment=AUGMENT, mask=None, seed=0, **changes):
    data = config(folder, **changes)
    return SampleDataset(read_manifest(folder, "train").entries, data, augment, seed, mask)


def test_samples_are_functions_of_seed_epoch_and_index(clips):
    first, again, other = dataset(clips), dataset(clips), dataset(clips, seed=1)
    a, b = first[(3, 2)], first[(0, 2)]
    torch.rand(7)  # earlier draws make no difference
    assert a.pixels.shape == (3, 4, 32, 32)
    assert a.pixels.dtype == torch.uint8
    assert torch.equal(a.pixels, again[(3, 2)].pixels)
    assert not torch.equal(a.pixels, b.pixels)
    assert not torch.equal(a.pixels, other[(3, 2)].pixels)
    assert (a.label, first[(3, 1)].label) == (0, 1)


def test_workers_change_nothing(clips):
    plan = plan_batch(4, 2, 1)
    batches = []
    for workers in (0, 1, 3):
        loader = training_loader(dataset(clips, workers=workers), plan, seed=0, rank=0, first=1, last=4, pin=False)
        batches.append(list(loader))
    for other in batches[1:]:
        assert len(other) == 6
        for a, b in zip(batches[0], other, strict=True):
            assert torch.equal(a.pixels, b.pixels)
            assert torch.equal(a.labels, b.labels)


def test_frames_of_a_clip_are_in_order_and_consecutive(clips):
    plain = AugmentConfig(crop_area=(1.0, 1.0), crop_ratio=(4 / 3, 4 / 3), flip=0)
    pixels = dataset(clips, augment=plain, image_size=[48, 64])[(0, 0)].pixels
    rows = [frame[0].float().mean(1).argmax().item() // 4 for frame in pixels.transpose(0, 1)]
    assert rows == list(range(rows[0], rows[0] + 8, 2))


def test_validation_takes_the_same_clip_every_time(clips):
    samples = dataset(clips, augment=None)
    assert torch.equal(samples[(0, 4)].pixels, samples[(9, 4)].pixels)
    seen = [
        int(i)
        for rank in range(3)
        for batch in validation_loader(samples, 2, rank=rank, world=3, pin=False)
        for i in batch.labels
    ]
    assert sorted(seen) == [0, 0, 0, 1, 1, 1]


def test_masks_come_with_the_samples(clips):
    samples = dataset(clips, frames=None, mask=MaskConfig(unit=8, ratio=0.6))
    sample = samples[(0, 0)]
    assert sample.pixels.shape == (3, 32, 32)
    assert sample.mask.shape == (4, 4)
    assert sample.mask.sum() == 10
    assert torch.equal(sample.mask, samples[(0, 0)].mask)
    assert not torch.equal(sample.mask, samples[(1, 0)].mask)


def test_broken_files_are_replaced_and_named(clips):
    (clips / "clip 2.mp4").write_bytes(b"not a video")
    samples = dataset(clips)
    sample = samples[(0, 2)]
    assert len(sample.broken) == 1
    assert "clip 2.mp4" in sample.broken[0]
    assert sample.label == 1  # of clip 3
    plain = dataset(clips, augment=None)[(0, 2)]
    assert (plain.label, len(plain.broken)) == (UNREADABLE_LABEL, 1)
    assert plain.pixels.shape == sample.pixels.shape
    for i in range(6):
        (clips / f"clip {i}.mp4").write_bytes(b"")
    with pytest.raises(UserError, match="nor can any other of the 6"):
        samples[(0, 0)]


def test_a_clip_that_makes_a_library_raise_is_replaced_and_named(clips):
    """A codec that FFmpeg does not know, and a picture that cannot be resized: neither ends the epoch."""
    unknown, thin = clips / "clip 1.mp4", clips / "clip 3.mp4"
    unknown.write_bytes(unknown.read_bytes().replace(b"avc1", b"none"))
    write_thin_video(thin.with_suffix(".mkv")).rename(thin)
    data = dataset(clips, short_side=224)
    sample = data[(0, 1)]
    assert sample.broken == (f"{unknown}: its video codec is unknown to FFmpeg",)
    (fault,) = data[(0, 3)].broken
    assert fault.startswith(f"{thin}: a picture of 1835008 x 224 pixels exceeds max_pixels = 67108864;")
    for batch in training_loader(
        dataset(clips, short_side=224, workers=1), plan_batch(6, 6, 1), seed=0, rank=0, first=0, last=2, pin=False
    ):
        assert sorted(batch.numbers) == list(range(6))
        assert len(batch.broken) == 2


def test_a_picture_that_augmentation_cannot_resize_is_named(tmp_path):
    """An image of one row is 10**7 times as wide; resized for its short side, it would take 10**14 bytes."""
    Image.new("L", (5_000_000, 1)).save(tmp_path / "thin.png")
    Image.new("L", (32, 32)).save(tmp_path / "plain.png")
    for split in ("train", "val"):
        (tmp_path / f"{split}.txt").write_text("thin.png 0\nplain.png 1\n")
    (tmp_path / "classes.txt").write_text("a\nb\n")
    data = dataset(tmp_path, augment=None, frames=None, image_size=2048)
    sample = data[(0, 0)]
    assert sample.label == UNREADABLE_LABEL
    assert [line.split(" (")[0] for line in sample.broken] == [f"{tmp_path / 'thin.png'}: cannot be decoded"]
    assert (data[(0, 1)].label, data[(0, 1)].broken) == (1, ())


def test_missing_files_are_reported_before_the_first_epoch(clips):
    (clips / "clip 5.mp4").unlink()
    with pytest.raises(UserError, match=r"clip 5\.mp4: is listed but does not exist \(1 of 6"):
        labelled_manifest(config(clips), "train")
    with pytest.raises(UsageError, match="takes one data set"):
        labelled_manifest(config(clips, source=[str(clips), str(clips)]), "train")


def test_images_and_videos_mix_in_pretraining(clips, tmp_path):
    photos = tmp_path / "photos"
    for i in range(60):
        (photos / f"{i % 3}").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30), (i, 0, 0)).save(photos / f"{i % 3}" / f"{i}.png")
    data = config(clips, source=[str(clips), str(photos)], frames=None, frames_per_video=2)
    train, val = unlabelled_mixture(data, validation=False), unlabelled_mixture(data, validation=True)
    paths = [train[i].entry.path for i in range(len(train))]
    images = {path for path in paths if path.suffix == ".png"}
    held = {path for path in (val[i].entry.path for i in range(len(val))) if path.suffix == ".png"}
    assert (len(paths), len(images), len(held)) == (12 + 57, 57, 3)  # one in twenty of each class folder
    assert not images & held
    samples = SampleDataset(train, data, AUGMENT, 0, None)
    assert {samples[(0, i)].pixels.shape for i in (0, 1, 68)} == {(3, 32, 32)}
    with pytest.raises(UsageError, match=r"photos: contains images, but data\.frames asks for clips"):
        unlabelled_mixture(config(photos), validation=False)
    (photos / "clip.mp4").write_bytes((clips / "clip 1.mp4").read_bytes())
    with pytest.raises(UsageError, match="both images and videos"):
        unlabelled_mixture(data, validation=False)
    with pytest.raises(UserError, match="no such data set"):
        unlabelled_mixture(config(tmp_path / "absent"), validation=False)


def test_test_clips_are_never_for_training(clips):
    (clips / "test.txt").write_text("clip 0.mp4 0\n")
    for changes in ({"train_split": "test"}, {"val_split": "test"}):
        with pytest.raises(UsageError, match="must not name the test split"):
            unlabelled_mixture(config(clips, **changes), validation="val_split" in changes)


def test_frames_of_a_video_are_decoded_once_an_epoch(clips, monkeypatch):
    """In any order: the frames of a video are neighbours, differ, and come from opening the file once."""
    opened = []
    reader = decoders.VideoReader
    monkeypatch.setattr(decoders, "VideoReader", lambda path, **limits: opened.append(path) or reader(path, **limits))
    data = config(clips, frames=None, frames_per_video=3, frame_stride=1, image_size=[48, 64])
    plain = AugmentConfig(crop_area=(1.0, 1.0), crop_ratio=(4 / 3, 4 / 3), flip=0)
    samples = SampleDataset(unlabelled_mixture(data, validation=False), data, plain, 0, None)
    plan = plan_batch(6, 3, 1)
    batches = list(training_loader(samples, plan, seed=0, rank=0, first=0, last=3, pin=False))
    assert len(opened) == len(set(opened)) == 6
    for batch in batches:
        rows = [int(frame[0].float().mean(1).argmax()) // 4 for frame in batch.pixels]
        assert rows[0] < rows[1] < rows[2]  # one from each third of the twelve frames
        assert [row // 4 for row in rows] == [0, 1, 2]
    alone = SampleDataset(unlabelled_mixture(data, validation=False), data, plain, 0, None)
    number = int(samples.mixture.order(0, 0)[4])
    assert torch.equal(alone[(0, number)].pixels, batches[1].pixels[1])  # does not need its neighbours
    assert len({alone[(epoch, number)].pixels.numpy().tobytes() for epoch in range(12)}) == 4  # all of its third
    assert len(unlabelled_mixture(data, validation=True)) == 6


def test_a_broken_video_is_opened_once_for_all_its_frames(clips, monkeypatch):
    (clips / "clip 2.mp4").write_bytes(b"not a video")
    data = config(clips, frames=None, frames_per_video=3)
    samples = SampleDataset(unlabelled_mixture(data, validation=False), data, AUGMENT, 0, None)
    opened = []
    reader = decoders.VideoReader
    monkeypatch.setattr(
        decoders, "VideoReader", lambda path, **limits: opened.append(path.name) or reader(path, **limits)
    )
    assert len(samples[(0, 6)].broken) == 1
    assert opened == ["clip 2.mp4", "clip 3.mp4"]


def test_order_is_a_permutation_an_epoch_and_does_not_depend_on_the_processes():
    def order(epoch):
        return np.random.default_rng((3, epoch)).permutation(10)

    def addresses(world, first=0, last=7):
        plan = plan_batch(6, 2, world)
        ranks = [list(StepSampler(10, order, plan, rank=r, first=first, last=last)) for r in range(world)]
        pieces = plan.accumulation
        return [
            [a for rank in ranks for piece in rank[step * pieces : (step + 1) * pieces] for a in piece]
            for step in range(last - first)
        ]

    alone = addresses(1)
    stream = [address for step in alone for address in step]
    assert [epoch for epoch, _ in stream[:40]] == [0] * 10 + [1] * 10 + [2] * 10 + [3] * 10
    for epoch in range(4):
        assert sorted(i for e, i in stream if e == epoch) == list(range(10))
    assert stream[:10] != [(0, i) for _, i in stream[10:20]]
    assert addresses(2) == alone
    assert addresses(3) == alone
    assert addresses(1, first=4) == alone[4:]


def test_batches_are_divided_evenly_or_refused():
    assert plan_batch(64, 16, 2).accumulation == 2
    assert plan_batch(12, 5, 1).micro == 4
    assert plan_batch(7, 5, 1).micro == 1
    with pytest.raises(UsageError, match=r"optim\.batch: 10 samples cannot be shared by 4"):
        plan_batch(10, 2, 4)


@pytest.mark.parametrize("short_side", [None, 40])
def test_a_crop_cut_while_decoding_gives_the_same_sample(clips, monkeypatch, short_side):
    augment = AugmentConfig(crop_area=(0.1, 1.0), rand_augment=2, erasing=0.5)
    (clips / "clip 2.mp4").write_bytes(b"not a video")  # clip 3 is read in its place, with the crop of number 2
    addresses = [(0, 2), (0, 3), (0, 3), (1, 0), (5, 4)]
    samples = dataset(clips, augment=augment, short_side=short_side)
    shapes = []
    inner = samples.transform.finish
    monkeypatch.setattr(samples.transform, "finish", lambda crop: shapes.append(crop.shape[-2:]) or inner(crop))
    found = [samples[address].pixels for address in addresses]
    assert all(shape.numel() < 48 * 64 for shape in shapes)
    # An ordinary function in place of the transform gets whole clips.
    whole = dataset(clips, augment=augment, short_side=short_side)
    transform, seen = whole.transform, []
    whole.transform = lambda clip: seen.append(clip.shape) or transform(clip)
    assert all(torch.equal(a, whole[address].pixels) for a, address in zip(found, addresses, strict=True))
    assert {tuple(shape[-2:]) for shape in seen} == {(48, 64) if short_side is None else (40, 54)}


class Brightness:
    """Annotations: the target of image i has the shape (1, i); an image is cropped to a random number of rows."""

    def read(self, label):
        return {"number": torch.full((1, label), label)}

    def transform(self, image, target, generator):
        rows = int(torch.randint(1, 9, (), generator=generator))
        return image[:, :rows, :8], target | {"rows": torch.tensor(rows)}


@pytest.fixture
def annotated(tmp_path):
    """Four images in shades of grey from 50 to 200."""
    entries = []
    for i in range(4):
        path = tmp_path / f"{i}.png"
        Image.new("RGB", (16, 12), (50 * (i + 1),) * 3).save(path)
        entries.append(Entry(path.name, str(path), i))
    return entries


def dense(entries, augment, seed=0):
    data = DataConfig(source="x", image_size=8, workers=0)
    return SampleDataset(entries, data, augment, seed, None, Brightness())


def test_targets_come_with_their_images_as_functions_of_the_address(annotated):
    samples, again = dense(annotated, AUGMENT), dense(annotated, AUGMENT)
    seen = {}
    for epoch in range(6):
        sample, other = samples[(epoch, 2)], again[(epoch, 2)]
        assert sample.target["number"].tolist() == [[2, 2]]
        assert sample.pixels.shape == (3, sample.target["rows"], 8)
        assert torch.equal(sample.pixels, other.pixels)
        seen[epoch] = int(sample.target["rows"])
    assert len(set(seen.values())) > 1
    assert not samples.one_size
    assert SampleDataset(annotated, samples.data, AUGMENT, 0, None).one_size


def test_a_batch_pads_images_and_gives_them_back(annotated):
    samples = dense(annotated, AUGMENT)
    single = [samples[(0, i)] for i in range(4)]
    assert len({sample.pixels.shape for sample in single}) > 1
    batch = collate(single).to(torch.device("cpu"))
    assert batch.pixels.shape == (4, 3, max(sample.pixels.shape[1] for sample in single), 8)
    for image, sample, padded in zip(batch.images(batch.pixels), single, batch.pixels, strict=True):
        assert torch.equal(image, sample.pixels)
        assert padded.sum() == image.sum()  # nothing but zeros around it
    assert [target["number"].shape[1] for target in batch.targets] == [0, 1, 2, 3]


def test_an_unreadable_annotated_image_is_replaced_in_training_and_kept_in_validation(annotated):
    annotated[1].path.write_bytes(b"not an image")
    sample = dense(annotated, AUGMENT)[(0, 1)]
    assert sample.target["number"].tolist() == [[2, 2]]
    assert len(sample.broken) == 1
    kept = dense(annotated, None)[(0, 1)]
    assert (kept.label, kept.target["number"].tolist()) == (UNREADABLE_LABEL, [[1]])
    assert kept.pixels.shape == (3, 8, 8)
    assert not kept.pixels.any()
