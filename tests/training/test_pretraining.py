"""SimMIM on real files: metrics and pictures, exact resumption with averaged weights, clips, the way to clip models."""

import json
import os
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont

import video_swinv2 as vs
from tests.training.runs import write_recipe
from video_swinv2.cli import main
from video_swinv2.config import load_config
from video_swinv2.data.datasets import collate
from video_swinv2.data.transforms import GREY
from video_swinv2.files import sha256
from video_swinv2.training.loop import run
from video_swinv2.training.metrics import read_metrics
from video_swinv2.training.tasks.base import contact_sheet
from video_swinv2.training.tasks.classification import Classification
from video_swinv2.training.tasks.simmim import Pretraining, draw_reconstruction
from video_swinv2.weights.store import read_tensors

CHAIN = [[12, 12], [12, 12], [12, 12], [6, 6]]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Two classes of noise with a bright half, 4 images to train and 3 to validate."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 3)):
        for i in range(count):
            pixels = rng.integers(0, 100, (48, 64, 3), dtype=np.uint8)
            pixels[: 24 if i % 2 else 48, : 64 if i % 2 else 32] += 100
            path = folder / split / f"class{i % 2}" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
    return folder


@pytest.fixture(scope="module")
def videos(tmp_path_factory, write_video):
    """Two classes of moving bars, 4 clips to train and 3 to validate."""
    folder = tmp_path_factory.mktemp("videos")
    rng = np.random.default_rng(1)
    for split, count in (("train", 4), ("val", 3)):
        lines = []
        for i in range(count):
            frames = rng.integers(0, 60, (8, 32, 40, 3), dtype=np.uint8)
            for t in range(8):
                frames[t, 3 * t : 3 * t + 6] = 200 if i % 2 else 90
            write_video(folder / split / f"{i}.mp4", frames)
            lines.append(f"{split}/{i}.mp4 {i % 2}")
        (folder / f"{split}.txt").write_text("\n".join(lines) + "\n")
    (folder / "classes.txt").write_text("bright\ndark\n")
    return folder


def simmim_recipe(folder, images, **changes):
    """Write the recipe of a SimMIM run on images, four steps long, with averaged weights."""
    values = {
        "out": str(folder / "run"),
        "init": "scratch",
        "model": {"name": "swinv2_nano", "window": 4, "drop_path": 0.1},
        "data": {"source": str(images), "image_size": 32, "workers": 0},
        "mask": {"unit": 8, "normalise_target": 7},
        "optim": {"epochs": 2, "lr": 1e-3, "batch": 2, "micro_batch": 2, "clip_norm": 5, "ema": 0.5},
        "engine": {"engine": "plain", "precision": "fp32", "device": "cpu"},
        "log_every": 1,
        "checkpoint_minutes": 60,
    }
    return write_recipe(folder, values, changes)


@pytest.fixture
def recipe(images, tmp_path):
    """A function that writes `simmim_recipe` with changes."""
    return partial(simmim_recipe, tmp_path, images)


@pytest.fixture(scope="module")
def finished_run(images, tmp_path_factory):
    """The folder of an undisturbed run of the recipe without changes."""
    return run(load_config(simmim_recipe(tmp_path_factory.mktemp("finished"), images)), Pretraining)


def clip_settings(videos, **mask):
    return {
        "data": {"source": str(videos), "frames": 4, "image_size": 32, "workers": 0},
        "model": {"name": "swinv2_nano", "patch_size": [2, 4, 4], "window": [2, 4, 4], "drop_path": 0.1},
        "mask": {"unit": [2, 8, 8], "normalise_target": 7} | mask,
    }


class Killed(Exception):
    pass


def stopped_after(steps):
    """SimMIM that dies in the step after `steps`, as in a power cut."""

    def make(config, construction):
        task = Pretraining(config, construction)
        loss, calls = task.loss, []

        def mortal(forward, batch):
            calls.append(1)
            if len(calls) > steps:
                raise Killed
            return loss(forward, batch)

        task.loss = mortal
        return task

    return make


@pytest.mark.parametrize("kind", ["images", "block", "tube"])
def test_interrupted_pretraining_equals_the_uninterrupted_to_the_bit(recipe, videos, tmp_path, kind, request):
    """Losses, metrics, trained and averaged weights, and pictures; killed in the middle of each epoch."""
    changes = {"checkpoint_minutes": 0} | ({} if kind == "images" else clip_settings(videos, shape=kind))
    if kind == "images":
        straight = request.getfixturevalue("finished_run")
    else:
        straight = run(load_config(recipe(out=str(tmp_path / "straight"), **changes)), Pretraining)
    config = load_config(recipe(out=str(tmp_path / "killed"), **changes))
    for steps in (1, 2):
        with pytest.raises(Killed):
            run(config, stopped_after(steps))
    killed = run(config, Pretraining)
    for lines in zip(read_metrics(straight), read_metrics(killed), strict=True):
        assert len({json.dumps({k: v for k, v in line.items() if "speed" not in k}) for line in lines}) == 1
    files = ["last.safetensors", *(f"checkpoints/step-000004/{kind}.safetensors" for kind in ("weights", "ema"))]
    for file in files:
        expected, found = read_tensors(straight / file)[0], read_tensors(killed / file)[0]
        assert expected.keys() == found.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items()), file
    pictures = sorted(path.name for path in (straight / "pictures").iterdir())
    assert pictures == ["step-000000.png", "step-000002.png", "step-000004.png"]
    for name in pictures:
        assert (straight / "pictures" / name).read_bytes() == (killed / "pictures" / name).read_bytes()


def test_averaged_weights_are_what_is_saved_and_measured(recipe, finished_run):
    folder = finished_run
    saved = read_tensors(folder / "last.safetensors")[0]
    average = read_tensors(folder / "checkpoints" / "step-000004" / "ema.safetensors")[0]
    trained = read_tensors(folder / "checkpoints" / "step-000004" / "weights.safetensors")[0]
    assert all(torch.equal(saved[name], tensor) for name, tensor in average.items())
    assert not torch.equal(saved["decoder.0.weight"], trained["decoder.0.weight"])
    assert vs.read_card(folder / "last.safetensors").provenance["weights"] == "averaged over the steps, decay 0.5"
    task = Pretraining(load_config(recipe()))
    task.module.load_state_dict(saved)
    batch = collate([task.val_samples[(0, index)] for index in range(3)])
    with torch.no_grad():
        tally = task.tally(task.module.eval(), batch)
    last = read_metrics(folder)[-1]
    assert tally["loss"] / 3 == pytest.approx(last["val/loss"], rel=1e-5)
    assert tally["mean_loss"] / 3 == pytest.approx(last["val/mean_loss"], rel=1e-5)


def test_validation_masks_are_functions_of_seed_and_place_alone(recipe):
    first, again = (Pretraining(load_config(recipe())).val_samples for _ in range(2))
    other = Pretraining(load_config(recipe(seed=1))).val_samples
    torch.manual_seed(5)
    masks = [first[(0, index)].mask for index in (2, 1, 0)][::-1]
    assert all(torch.equal(mask, again[(0, index)].mask) for index, mask in enumerate(masks))
    assert not torch.equal(masks[0], masks[1])
    assert not all(torch.equal(mask, other[(0, index)].mask) for index, mask in enumerate(masks))


def test_metrics_do_not_depend_on_the_batch(recipe):
    """Where the border cuts cells, samples hide different numbers of pixels; each sample still counts the same."""
    config = load_config(recipe(data={"image_size": 28}, mask={"unit": 16, "ratio": 0.3}))
    task = Pretraining(config)
    samples = [task.val_samples[(0, index)] for index in range(3)]
    task.module.eval()
    with torch.no_grad():
        whole = task.tally(task.module, collate(samples))
        parts = [task.tally(task.module, collate([sample])) for sample in samples]
    for key in ("loss", "mean_loss"):
        assert whole[key] == pytest.approx(sum(part[key] for part in parts), rel=1e-5)


def test_the_rows_of_a_picture():
    original = torch.full((1, 3, 2, 4, 4), 10, dtype=torch.uint8)
    hidden = torch.zeros(1, 2, 4, 4, dtype=torch.bool)
    hidden[:, 0, :2] = True
    drawn = draw_reconstruction(original, torch.full_like(original, 99), hidden)
    picture = drawn[:, :, -10:]
    assert (drawn[:, :, -12:-10] == 255).all(), "the names of the rows end before the tiles"
    assert picture.shape == (3, 3 * 6 - 2, 2 * 6 - 2)  # three rows of two frames, 2 white pixels between them
    assert (picture[:, :4, :4] == 10).all()
    assert picture[:, 6, 0].tolist() == list(GREY)
    assert (picture[:, 12:14, :4] == 99).all()
    assert (picture[:, 14:, :4] == 10).all()
    assert (picture[:, :, 4:6] == 255).all()
    assert (picture[:, 12:, 6:] == 10).all()
    row = torch.arange(3, dtype=torch.uint8).view(3, 1, 1, 1).expand(3, 3, 2, 2)
    assert contact_sheet([row])[0, 0].tolist() == [0, 0, 255, 255, 1, 1, 255, 255, 2, 2]


def test_every_row_of_a_picture_has_its_name():
    """Of two clips, the rows original, masked and predicted twice, in tiles of 64 pixels."""
    clips = torch.zeros(2, 3, 2, 64, 64, dtype=torch.uint8)
    picture = draw_reconstruction(clips, clips, torch.zeros(2, 2, 64, 64, dtype=torch.bool))
    margin = picture[:, :, : picture.shape[2] - (2 * 66 - 2)]
    assert picture.shape[1] == 6 * 66 - 2
    rows = [margin[:, 66 * row : 66 * row + 64] for row in range(6)]
    font = ImageFont.load_default(9)
    for row, name in zip(rows, ("original", "masked", "predicted") * 2, strict=True):
        left, _, right, _ = font.getbbox(name, anchor="rm")
        inked = (row < 128).all(0).nonzero()
        assert inked[:, 0].float().mean() == pytest.approx(32, abs=3), "in the middle of the row"
        assert inked[:, 1].max() - inked[:, 1].min() + 1 == pytest.approx(right - left, abs=2), name
    assert all(torch.equal(one, other) for one, other in zip(rows[:3], rows[3:], strict=True))


def test_a_normalised_target_is_drawn_as_pixels(recipe):
    """A perfect prediction of the normalised target is drawn as the original pixels."""
    task = Pretraining(load_config(recipe()))

    def perfect(inputs, masks):
        return task._inputs(batch)[2]

    batch = collate([task.val_samples[(0, index)] for index in range(3)])
    picture = task.picture(perfect, torch.device("cpu")).int()[:, :, -(3 * 34 - 2) :]
    original, masked, rebuilt = picture[:, :32], picture[:, 34:66], picture[:, 68:]
    assert (original - rebuilt).abs().max() <= 1
    assert (original - masked).abs().max() > 20


def test_pictures_come_as_often_as_asked(recipe, finished_run):
    """At every validation, here each epoch of two steps; every second epoch if asked; and always at the end."""
    seldom = run(load_config(recipe(optim={"epochs": 3}, pictures_epochs=2)), Pretraining)
    for folder, steps in ((finished_run, (0, 2, 4)), (seldom, (0, 4, 6))):
        names = sorted(path.name for path in (folder / "pictures").iterdir())
        assert names == [f"step-{step:06d}.png" for step in steps]


@pytest.mark.parametrize(
    ("clips", "changes", "words"),
    [
        (False, {"mask": {"unit": 6}}, "mask.unit: [6, 6] is not a multiple of the model's patch [4, 4]"),
        (True, {"mask": {"unit": [3, 8, 8]}}, "mask.unit: [3, 8, 8] is not a multiple"),
        (False, {"mask": {"unit": [2, 8, 8]}}, "mask.unit"),
        (False, {"mask": {"unit": 32}}, "mask.unit: all 1 cells would be hidden"),
        (False, {"mask": {"shape": "tube"}}, "mask.shape: a tube is for clips"),
        (False, {"mask": {"normalise_target": 46}}, "mask.normalise_target: 46 is not an odd number"),
    ],
)
def test_a_mask_that_does_not_fit_is_one_line(recipe, videos, capfd, clips, changes, words):
    settings = clip_settings(videos) if clips else {}
    settings["mask"] = settings.get("mask", {}) | changes["mask"]
    assert main(["pretrain", str(recipe(**settings))]) == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error:")]
    assert words in line


def test_a_model_pretrained_on_clips_is_fine_tuned(recipe, videos, tmp_path):
    clips = clip_settings(videos, shape="tube")
    before = run(load_config(recipe(out=str(tmp_path / "before"), **clips)), Pretraining)
    config = recipe(out=str(tmp_path / "after"), init=str(before), **clips)
    after = run(load_config(config), Classification)
    encoder = read_tensors(before / "model.safetensors")[0]
    start = read_tensors(after / "checkpoints" / "step-000002" / "weights.safetensors")[0]
    name = "layers.2.blocks.0.attn.qkv.weight"
    assert (encoder[f"encoder.{name}"] - start[name]).abs().max() < 5e-3, "two steps away, not another start"
    assert vs.load_model(after)(torch.zeros(1, 3, 4, 32, 32)).shape == (1, 2)
    (ancestor,) = vs.read_card(after).provenance["ancestors"]
    assert ancestor["task"] == "SimMIM on clips"


def test_the_chain_carries_normaliser_and_ancestors(recipe, images, videos, tmp_path):
    """SimMIM at 192 with window 12, supervised at 224 with window 14, then a clip model: two steps each."""
    twice = {"epochs": 1, "batch": 2, "micro_batch": 2, "ema": 0}
    settings = {"optim": twice, "mask": {"unit": 32, "normalise_target": 47}}
    small = {"source": str(images), "image_size": 192, "workers": 0}
    simmim = run(
        load_config(recipe(out=str(tmp_path / "simmim"), data=small, model={"window": 12}, **settings)), Pretraining
    )
    image = recipe(
        out=str(tmp_path / "image"),
        init=str(simmim / "model.safetensors"),
        data=small | {"image_size": 224},
        model={"window": 14},
        augment={"mixup": 0.8, "cutmix": 1.0, "rand_augment": 2, "erasing": 0.25},
        optim=twice | {"layer_decay": 0.75, "label_smoothing": 0.1},
    )
    supervised = run(load_config(image), Classification)
    shape = {"patch_size": [2, 4, 4], "window": [2, 14, 14]}
    clip = run(
        load_config(
            recipe(
                out=str(tmp_path / "clip"),
                init=str(supervised / "model.safetensors"),
                data={"source": str(videos), "frames": 4, "image_size": 64},
                model=shape,
                optim=twice,
            )
        ),
        Classification,
    )
    assert vs.read_card(simmim).architecture["cpb_norm"] == CHAIN
    assert vs.read_card(supervised).architecture["cpb_norm"] == CHAIN
    assert [norm[1:] for norm in vs.read_card(clip).architecture["cpb_norm"]] == CHAIN

    record = json.loads((clip / "run.json").read_text())
    ancestors = record["init"]["ancestors"]
    assert ancestors == vs.read_card(clip).provenance["ancestors"]
    assert [(a["file"], a["task"], a["steps"]) for a in ancestors] == [
        (str(supervised / "model.safetensors"), "classification of images", 2),
        (str(simmim / "model.safetensors"), "SimMIM on images", 2),
    ]
    assert [a["sha256"] for a in ancestors] == [sha256(f / "model.safetensors") for f in (supervised, simmim)]
    assert all(a["data"]["source"] == [str(images)] for a in ancestors)
    assert record["task"] == "classification of clips"


def test_ancestors_reach_through_a_conversion(recipe, finished_run, tmp_path):
    assert main(["convert", str(finished_run / "model.safetensors"), str(tmp_path / "backbone.safetensors")]) == 0
    task = {"init": str(tmp_path / "backbone.safetensors"), "out": str(tmp_path / "after")}
    after = run(load_config(recipe(**task)), Classification)
    ancestors = vs.read_card(after).provenance["ancestors"]
    assert [ancestor["task"] for ancestor in ancestors] == ["conversion", "SimMIM on images"]
    assert ancestors[1]["sha256"] == sha256(finished_run / "model.safetensors")


@pytest.mark.slow
def test_partitioned_processes_validate_and_draw_what_one_does(recipe, tmp_path):
    """ZeRO-3, two processes, three validation samples: every forward pass is a collective, so none may be left out."""
    alone = {"model": {"drop_path": 0}, "optim": {"micro_batch": 1}}
    plain = run(load_config(recipe(out=str(tmp_path / "plain"), **alone)), Pretraining)
    config = recipe(out=str(tmp_path / "two"), **alone, engine={"engine": "deepspeed", "zero_stage": 3})
    launcher = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "-m",
        "video_swinv2",
        "pretrain",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *launcher, str(config)], check=True, env=environment, timeout=600)
    for ours, theirs in zip(read_metrics(tmp_path / "two"), read_metrics(plain), strict=True):
        for key in ours.keys() & {"val/loss", "val/mean_loss", "train/loss"}:
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4)
    start = "pictures/step-000000.png"
    assert (tmp_path / "two" / start).read_bytes() == (plain / start).read_bytes()
