"""`video-swinv2 convert`: a model file with the same outputs as the checkpoint, or one line that says why not."""

from __future__ import annotations

import json

import pytest
import torch

import video_swinv2 as vs
from tests.closeness import assert_close, assert_same
from tests.weights.released import as_shards, microsoft_state, ours, randomise, timm_model
from video_swinv2.cli import main
from video_swinv2.files import sha256


def run(capsys, *arguments):
    code = main(["convert", *map(str, arguments)])
    return code, capsys.readouterr()


@pytest.fixture
def microsoft(tmp_path):
    reference = ours()
    torch.save({"model": microsoft_state(reference, window=4)}, tmp_path / "a.pth")
    return tmp_path / "a.pth", reference


def test_an_image_model_whose_size_is_found_from_the_tensors(microsoft, tmp_path, capsys):
    source, reference = microsoft
    code, printed = run(capsys, source, tmp_path / "out.safetensors")
    assert code == 0
    assert "Microsoft SwinV2" in printed.out
    assert "the file's coordinate tables" in printed.out
    model = vs.load_model(tmp_path / "out.safetensors")
    assert model.name == "swinv2_nano"
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert_close(model(x), reference(x))
    assert_same(model.state_dict(), reference.state_dict())
    card = vs.read_card(tmp_path / "out.safetensors")
    assert card.preprocessing == vs.Preprocessing(None, 1, (64, 64))
    assert card.provenance["sha256"] == {"a.pth": sha256(source)}
    assert card.provenance["layout"] == "Microsoft SwinV2"


def test_a_clip_model_from_image_weights_and_another_window_from_that(microsoft, tmp_path, capsys):
    source, reference = microsoft
    options = ["--frames", 8, "--window", "2,4,4", "--patch-size", "1,4,4", "--frame-stride", 4]
    assert run(capsys, source, tmp_path / "clip.safetensors", *options)[0] == 0
    clip = vs.load_model(tmp_path / "clip.safetensors")
    assert (clip.frames, clip.window, clip.patch_size) == (8, (2, 4, 4), (1, 4, 4))
    assert clip.cpb_norm == [(2, 4, 4), (2, 4, 4), (2, 4, 4), (2, 2, 2)]
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        still = clip(x[:, :, None].expand(-1, -1, 8, -1, -1))
        assert_close(still, reference(x))
    assert vs.read_card(tmp_path / "clip.safetensors").preprocessing.frame_stride == 4

    options = ["--frames", 16, "--window", "4,8,8", "--image-size", "96,128", "--json"]
    code, printed = run(capsys, tmp_path / "clip.safetensors", tmp_path / "wide", *options)
    assert code == 0
    assert len(json.loads(printed.out)["loaded"]) == len(clip.state_dict())
    wide = vs.load_model(tmp_path / "wide")
    assert (wide.frames, wide.window, wide.image_size) == (16, (4, 8, 8), (96, 128))
    assert wide.cpb_norm == clip.cpb_norm
    card = vs.read_card(tmp_path / "wide")
    assert card.preprocessing == vs.Preprocessing(16, 4, (96, 128))
    assert card.provenance["provenance"]["converted_from"] == "a"
    assert json.loads((tmp_path / "wide" / "config.json").read_text())["architecture"]["window"] == [4, 8, 8]


def test_sharded_timm_folder_with_class_names(tmp_path, capsys):
    """A subset of the folder's classes, matched by name, in another order."""
    reference = timm_model()
    config = {
        "architecture": "swinv2_tiny_window8_256",
        "model_args": {"img_size": 64, "window_size": 4},
        "label_names": ["n0", "n1", "crane", "n3", "crane", "n5"],
    }
    folder = as_shards(dict(reference.state_dict()), tmp_path / "timm", config)
    (tmp_path / "names.txt").write_text("n5\nn0\nn3\n")
    code, printed = run(capsys, folder, tmp_path / "out.safetensors", "--classes", tmp_path / "names.txt")
    assert code == 0
    assert "head: 3 of the file's 6 classes, by name" in printed.out
    model = vs.load_model(tmp_path / "out.safetensors")
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert_close(model(x), reference(x)[:, [5, 0, 3]])
    assert vs.read_card(tmp_path / "out.safetensors").classes == ("n5", "n0", "n3")

    (tmp_path / "names.txt").write_text("n5\ncrane\n")
    code, printed = run(capsys, folder, tmp_path / "other.safetensors", "--classes", tmp_path / "names.txt")
    assert "do not include 'crane' (1 of 2 not found)" in printed.out
    assert vs.load_model(tmp_path / "other.safetensors").num_classes == 2


def test_class_names_for_a_checkpoint_without_any(microsoft, tmp_path, capsys):
    source, reference = microsoft
    (tmp_path / "names.txt").write_text("\n".join("abcdef"))
    assert run(capsys, source, tmp_path / "o.safetensors", "--classes", tmp_path / "names.txt")[0] == 0
    assert vs.read_card(tmp_path / "o.safetensors").classes == tuple("abcdef")
    assert torch.equal(vs.load_model(tmp_path / "o.safetensors").head.weight, reference.head.weight)


def test_our_simmim_file_becomes_a_backbone(tmp_path, capsys):
    pretrained = vs.SimMIM(ours(num_classes=0), 32)
    vs.save_model(
        pretrained, tmp_path / "simmim.safetensors", classes=[], preprocessing=vs.Preprocessing(None, 1, (64, 64))
    )
    assert run(capsys, tmp_path / "simmim.safetensors", tmp_path / "o.safetensors")[0] == 0
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = pretrained.encoder.forward_features(x)
        model = vs.load_model(tmp_path / "o.safetensors")
        assert_close(model.forward_features(x), expected)


def test_an_architecture_without_a_name_and_a_wrong_name(tmp_path, capsys):
    reference = randomise(
        vs.SwinV2(embed_dim=32, depths=(1, 1), num_heads=(1, 2), num_classes=2, image_size=64, window=4)
    )
    torch.save(reference.state_dict(), tmp_path / "small.pth")
    options = ["--image-size", 64, "--window", 4, "--cpb-norm", "4,4"]
    assert run(capsys, tmp_path / "small.pth", tmp_path / "o.safetensors", *options)[0] == 0
    assert vs.load_model(tmp_path / "o.safetensors").name == "swinv2_custom"
    code, printed = run(capsys, tmp_path / "small.pth", tmp_path / "o.safetensors", *options, "--model", "swinv2_nano")
    assert code == 1
    assert printed.err.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--model", "swinv2_tny"], 2, "did you mean 'swinv2_tiny'"),
        (["--model", "swinv2_tiny"], 1, "in the file and"),
        (["--window", "4,4,4"], 2, "window"),
        (["--cpb-norm", "4,4"], 1, "its weights have 2 stages"),
        (["--classes", "absent.txt"], 2, "absent.txt: cannot be read as UTF-8 text"),
        (["--patch-size", "8"], 1, "patch_embed.proj.weight"),
    ],
)
def test_refusals_are_one_line_and_write_nothing(microsoft, tmp_path, capsys, options, code, words):
    got, printed = run(capsys, microsoft[0], tmp_path / "out.safetensors", *options)
    assert got == code
    assert words in printed.err
    assert printed.err.count("\n") == 1
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize(
    ("option", "value"), [("--frames", "0"), ("--frame-stride", "0"), ("--cpb-norm", "4,4,0,4"), ("--window", "4,-4,4")]
)
def test_numbers_out_of_range_are_usage_errors(microsoft, tmp_path, capsys, option, value):
    with pytest.raises(SystemExit, match="2"):
        run(capsys, microsoft[0], tmp_path / "out.safetensors", f"{option}={value}")
    assert f"argument {option}: must be from 1 to 10,000" in capsys.readouterr().err


def test_outputs_that_cannot_be_written(microsoft, tmp_path, capsys):
    source, _ = microsoft
    assert "ends in .safetensors, or a folder" in run(capsys, source, tmp_path / "out.pth")[1].err
    assert run(capsys, source, tmp_path / "hub")[0] == 0
    for same in (tmp_path / "hub", tmp_path / "hub" / "model.safetensors"):
        code, printed = run(capsys, tmp_path / "hub", same)
        assert code == 2
        assert "is the checkpoint itself" in printed.err
    with pytest.raises(SystemExit) as ended:
        main(["convert", str(source), "o", "--window", "a,b"])
    assert ended.value.code == 2
    assert "whole numbers such as" in capsys.readouterr().err
