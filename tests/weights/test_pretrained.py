"""What a timm or Hugging Face user expects of a model, and models made of nothing but a checkpoint."""

from __future__ import annotations

import json

import pytest
import torch
from timm.optim import param_groups_layer_decay

import video_swinv2 as vs
from tests.closeness import assert_close, assert_same
from tests.weights.released import hugging_face_config, microsoft_state, ours, randomise
from video_swinv2.engine.optimizer import decays, layer_id, parameter_groups
from video_swinv2.errors import UsageError, UserError


def test_folder_round_trip(tmp_path):
    model = randomise(vs.create_model("swinv2_nano", num_classes=3, frames=8, image_size=64, window=(2, 4, 4)))
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
    wider = vs.SwinV2.from_pretrained(tmp_path / "hub", window=(4, 8, 8), frames=16, image_size=128)
    assert (wider.cpb_norm, wider.window, wider.frames) == (model.cpb_norm, (4, 8, 8), 16)


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
