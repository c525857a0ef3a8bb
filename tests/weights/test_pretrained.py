"""What a timm or Hugging Face user expects of a model, and models made of nothing but a checkpoint."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image
from timm.optim import param_groups_layer_decay

import video_swinv2 as vs
from tests.closeness import assert_close, assert_same
from tests.weights.released import hugging_face_config, microsoft_state, ours, randomise, timm_model
from video_swinv2.cli import main
from video_swinv2.engine.optimizer import decays, layer_id, parameter_groups
from video_swinv2.errors import UsageError, UserError


def test_folder_round_trip(tmp_path):
    model = randomise(vs.create_model("swinv2_nano", num_classes=3, frames=8, image_size=64, window=(2, 4, 4)))
    model.preprocessing = vs.Preprocessing(frames=8, frame_stride=2, image_size=(64, 64))
    model.save_pretrained(tmp_path / "hub", classes=["a", "b", "c"])
    assert sorted(file.name for file in (tmp_path / "hub").iterdir()) == ["config.json", "model.safetensors"]
    again = vs.SwinV2.from_pretrained(tmp_path / "hub")
    assert again.architecture() == model.architecture()
    assert not again.training
    x = torch.randn(1, 3, 8, 64, 64)
    with torch.no_grad():
        assert_close(again(x), model(x))
    assert_same(again.state_dict(), model.state_dict())
    assert vs.read_card(tmp_path / "hub").classes == ("a", "b", "c")
    config = json.loads((tmp_path / "hub" / "config.json").read_text())
    assert config["classes"] == ["a", "b", "c"]
    assert config["architecture"]["cpb_norm"] == [list(norm) for norm in model.cpb_norm]
    assert config["preprocessing"]["frame_stride"] == 2
    wider = vs.SwinV2.from_pretrained(tmp_path / "hub", window=(4, 8, 8), frames=16, image_size=128)
    assert (wider.cpb_norm, wider.window, wider.frames) == (model.cpb_norm, (4, 8, 8), 16)
    assert (wider.classes, wider.preprocessing) == (("a", "b", "c"), vs.Preprocessing(16, 2, (128, 128)))


def test_classes_and_preprocessing_survive_from_file_to_file(tmp_path):
    """Saved again without saying them again, they are still those of the first file."""
    shown = vs.Preprocessing(8, 4, (64, 64), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    model = vs.create_model("swinv2_nano", num_classes=2, frames=8, image_size=64, window=(2, 4, 4))
    vs.save_model(model, tmp_path / "a.safetensors", classes=["x", "y"], preprocessing=shown)
    for number, load in enumerate((vs.load_model, vs.SwinV2.from_pretrained)):
        loaded = load(tmp_path / "a.safetensors")
        assert (loaded.classes, loaded.preprocessing) == (("x", "y"), shown)
        loaded.save_pretrained(tmp_path / str(number))
        card = vs.read_card(tmp_path / str(number))
        assert (card.classes, card.preprocessing) == (("x", "y"), shown)
        vs.save_model(loaded, tmp_path / "b.safetensors")
        assert vs.read_card(tmp_path / "b.safetensors") == card


def test_a_frame_stride_is_never_guessed(tmp_path):
    ours().save_pretrained(tmp_path / "image")  # an image model has none
    assert vs.read_card(tmp_path / "image").preprocessing == vs.Preprocessing(None, 1, (64, 64))
    clip = vs.SwinV2.from_pretrained(tmp_path / "image", frames=4)
    assert clip.preprocessing is None
    with pytest.raises(UserError, match=r"clip.model.safetensors: .*set model\.preprocessing"):
        clip.save_pretrained(tmp_path / "clip")
    assert not (tmp_path / "clip").exists()
    clip = vs.SwinV2.from_pretrained(tmp_path / "image", frames=4, frame_stride=3)
    clip.save_pretrained(tmp_path / "clip")
    assert vs.read_card(tmp_path / "clip").preprocessing == vs.Preprocessing(4, 3, (64, 64))


def test_a_fresh_head_is_told_and_has_no_class_names(tmp_path, capsys):
    model = ours(num_classes=2)
    model.save_pretrained(tmp_path, classes=["x", "y"])
    assert vs.SwinV2.from_pretrained(tmp_path, num_classes=2).classes == ("x", "y")
    assert capsys.readouterr() == ("", "")
    other = vs.SwinV2.from_pretrained(tmp_path, num_classes=7)
    assert (other.num_classes, other.classes, other.head.weight.shape) == (7, (), (7, 256))
    out, err = capsys.readouterr()
    assert not out
    assert "initialised     2" in err
    assert "the file has 2 classes, this model 7: head.bias, head.weight" in err
    bare = vs.SwinV2.from_pretrained(tmp_path, num_classes=0)
    assert (bare.classes, bare.get_classifier()) == ((), bare.head)
    assert bare(torch.zeros(1, 3, 64, 64)).shape == (1, 256)
    assert capsys.readouterr() == ("", "")
    model.classes = ("x", "y")
    model.reset_classifier(2)
    assert model.classes == ()


def test_time_noise(tmp_path):
    ours().save_pretrained(tmp_path)
    plain, noisy = (vs.SwinV2.from_pretrained(tmp_path, frames=4, time_noise=noise) for noise in (0.0, 0.5))
    kernels = [model.patch_embed.proj.weight for model in (plain, noisy)]
    assert not torch.equal(*kernels)
    assert_close(kernels[1].sum(dim=2), kernels[0].sum(dim=2))
    with pytest.raises(UserError, match="time_noise needs an inflated patch kernel"):
        vs.SwinV2.from_pretrained(tmp_path, time_noise=0.5)


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_other_channels_as_timm_adapts_them(tmp_path, channels):
    from timm.models import adapt_input_conv

    model = ours()
    model.save_pretrained(tmp_path / "rgb", classes=list("abcdef"))
    other = vs.SwinV2.from_pretrained(tmp_path / "rgb", in_chans=channels)
    kernel = adapt_input_conv(channels, model.patch_embed.proj.weight.detach())
    assert_close(other.patch_embed.proj.weight, kernel)
    assert other(torch.zeros(1, channels, 64, 64)).shape == (1, 6)
    with pytest.raises(ValueError, match=rf"takes \(B, {channels}, H, W\)"):
        other(torch.zeros(1, 3, 64, 64))
    # In a clip model the kernel is inflated as well. Its file keeps the number of channels.
    clip = vs.SwinV2.from_pretrained(tmp_path / "rgb", in_chans=channels, frames=4, frame_stride=1)
    assert_close(clip.patch_embed.proj.weight.sum(dim=2), kernel)
    clip.save_pretrained(tmp_path / "other")
    again = vs.load_model(tmp_path / "other")
    assert (again.in_chans, len(again.preprocessing.mean), again.classes) == (channels, channels, tuple("abcdef"))
    assert_same(again.state_dict(), clip.state_dict())


def test_commands_refuse_inputs_other_than_rgb_in_one_line(tmp_path, capsys):
    names = list("abcdef")
    model = ours(in_chans=2)
    shown = vs.Preprocessing(None, 1, (64, 64), (0.5, 0.5), (0.2, 0.2))
    vs.save_model(model, tmp_path / "m.safetensors", classes=names, preprocessing=shown)
    for split in ("train", "test"):
        (tmp_path / "data" / split / "a").mkdir(parents=True)
        Image.new("RGB", (64, 64)).save(tmp_path / "data" / split / "a" / "a.png")
    data, out = str(tmp_path / "data"), str(tmp_path / "out")
    for verb in (["predict"], ["test", "--out", out], ["probe", "--out", out]):
        assert main([verb[0], str(tmp_path / "m.safetensors"), data, *verb[1:]]) == 1
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith(f"error: {tmp_path / 'm.safetensors'}: takes inputs of 2 channels")
    ours(num_classes=0, features_only=True).save_pretrained(tmp_path / "maps")
    assert main(["probe", str(tmp_path / "maps"), data, "--out", out]) == 1
    assert "a features_only model has no final norm" in capsys.readouterr().err


def test_a_channel_that_is_grey_gives_what_rgb_gave(tmp_path):
    model = ours()
    model.save_pretrained(tmp_path)
    x = torch.randn(2, 1, 64, 64)
    with torch.no_grad():
        assert_close(vs.SwinV2.from_pretrained(tmp_path, in_chans=1)(x), model(x.expand(-1, 3, -1, -1)))


@pytest.mark.parametrize("frames", [None, 4])
def test_features_only(tmp_path, frames):
    ours().save_pretrained(tmp_path / "image")
    whole = vs.SwinV2.from_pretrained(tmp_path / "image", frames=frames, frame_stride=1)
    model = vs.SwinV2.from_pretrained(tmp_path / "image", frames=frames, frame_stride=1, features_only=True)
    x = torch.randn(2, 3, *([frames] if frames else []), 64, 64)
    with torch.no_grad():
        maps = model(x)
        assert_same(dict(enumerate(maps)), dict(enumerate(whole.forward_pyramid(x))))
    assert [found.shape[1] for found in maps] == model.feature_info.channels() == [32, 64, 128, 256]
    assert [64 // found.shape[-1] for found in maps] == model.feature_info.reduction() == [4, 8, 16, 32]
    assert not {"norm.weight", "head.weight"} & model.state_dict().keys()
    model.save_pretrained(tmp_path / "features")
    assert vs.load_model(tmp_path / "features").features_only
    with pytest.raises(ValueError, match="takes no head"):
        model.reset_classifier(2)
    with pytest.raises(ValueError, match="num_classes: 2"):
        vs.create_model("swinv2_nano", num_classes=2, features_only=True)


def test_names_of_the_head_and_the_features_are_timms():
    theirs, mine = timm_model(), ours()
    assert [mine.feature_info[i] for i in range(len(mine.feature_info))] == theirs.feature_info
    assert mine.feature_info.module_name() == [stage["module"] for stage in theirs.feature_info]
    assert (mine.num_classes, mine.num_features, mine.in_chans) == (
        theirs.num_classes,
        theirs.num_features,
        theirs.in_chans,
    )
    assert mine.get_classifier().weight.shape == theirs.get_classifier().weight.shape
    features = mine.forward_features(torch.randn(1, 3, 64, 64))
    assert_close(mine.head(mine.forward_head(features, pre_logits=True)), mine.forward_head(features))


def test_of_a_hugging_face_folder(tmp_path):
    from transformers import Swinv2ForImageClassification

    reference = randomise(Swinv2ForImageClassification(hugging_face_config(num_labels=5)))
    reference.save_pretrained(tmp_path)
    model = vs.SwinV2.from_pretrained(tmp_path)
    assert (model.name, model.image_size, model.window, model.num_classes) == ("swinv2_nano", (64, 64), (4, 4), 5)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert_close(model(x), reference(x).logits)
        clip = vs.SwinV2.from_pretrained(tmp_path, frames=8)
        still = clip(x[:, :, None].expand(-1, -1, 8, -1, -1))
        assert_close(still, model(x))
    assert (clip.frames, clip.window, clip.patch_size) == (8, (8, 4, 4), (2, 4, 4))


def test_sizes_of_microsofts_file_are_read_from_its_buffers(tmp_path):
    torch.save({"model": microsoft_state(ours(), window=4)}, tmp_path / "a.pth")
    model = vs.SwinV2.from_pretrained(tmp_path / "a.pth")
    assert (model.image_size, model.window, model.cpb_norm) == ((64, 64), (4, 4), ours().cpb_norm)


def test_sizes_that_nothing_tells_are_asked_for(tmp_path):
    torch.save(ours().state_dict(), tmp_path / "bare.pth")
    with pytest.raises(UsageError, match=r"does not contain image_size.*--image-size"):
        vs.SwinV2.from_pretrained(tmp_path / "bare.pth")
    with pytest.raises(UsageError, match=r"does not contain window"):
        vs.SwinV2.from_pretrained(tmp_path / "bare.pth", image_size=64)
    with pytest.raises(UserError, match=r"normaliser is not in the file"):
        vs.SwinV2.from_pretrained(tmp_path / "bare.pth", image_size=64, window=4)
    state = {name: t for name, t in ours().state_dict().items() if not name.startswith("layers.1.blocks.0.")}
    torch.save(state, tmp_path / "gap.pth")
    with pytest.raises(UserError, match=r"blocks .* are missing"):
        vs.SwinV2.from_pretrained(tmp_path / "gap.pth", image_size=64, window=4, cpb_norm=[(4, 4)] * 4)


def test_reset_classifier():
    model = ours().double()
    assert model.num_features == 256
    model.reset_classifier(11)
    assert model(torch.randn(2, 3, 64, 64).double()).shape == (2, 11)
    assert model.num_classes == 11
    assert 0.015 < model.head.weight.std() < 0.025
    assert not model.head.bias.any()
    model.reset_classifier(0)
    assert model(torch.randn(2, 3, 64, 64).double()).shape == (2, 256)
    assert vs.SwinV2(**model.architecture()).state_dict().keys() == model.state_dict().keys()


def test_gradient_checkpointing_switch():
    model = ours().double().train()  # in fp64: rounding grows a lot where gradients are sums that cancel
    model.set_grad_checkpointing()
    assert model.checkpoint_blocks == 8
    x = torch.randn(1, 3, 64, 64).double()
    gradients = []
    for enable in (True, False):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(x).sum().backward()
        gradients.append(model.layers[0].blocks[0].attn.qkv.weight.grad.clone())
    assert model.checkpoint_blocks == 0
    assert_close(*gradients, 1e-6)


def test_names_and_groups_are_those_of_our_own_optimizer():
    model = vs.SimMIM(ours(num_classes=0), 32).encoder
    undecayed = model.no_weight_decay()
    assert {name for name, p in model.named_parameters() if not decays(name, p)} == undecayed
    assert {"mask_token", "layers.0.blocks.0.attn.logit_scale", "layers.0.blocks.0.attn.cpb_mlp.2.weight"} <= undecayed
    depth, stage = model.group_matcher(), model.group_matcher(coarse=True)
    for name, _ in model.named_parameters():
        assert depth(name) == layer_id(name, model.depths)
    assert [
        stage(name) for name in ("mask_token", "layers.0.blocks.1.norm1.bias", "layers.0.downsample.norm.bias")
    ] == [
        0,
        1,
        1,
    ]
    assert [stage(name) for name in ("layers.1.blocks.0.norm1.bias", "layers.3.blocks.1.norm1.bias", "head.bias")] == [
        2,
        4,
        5,
    ]


def test_timms_optimizer_makes_our_groups():
    model = ours()
    theirs = param_groups_layer_decay(
        model, weight_decay=0.05, no_weight_decay_list=model.no_weight_decay(), layer_decay=0.75
    )
    groups = parameter_groups(model, model.depths, weight_decay=0.05, layer_decay=0.75)

    def by_parameter(groups):
        return {id(p): (pytest.approx(g["lr_scale"]), g["weight_decay"]) for g in groups for p in g["params"]}

    assert by_parameter(theirs) == by_parameter(groups)
