"""Every layout of a released checkpoint loads to the outputs of the library it comes from, nothing unexplained."""

from __future__ import annotations

import argparse
import json

import pytest
import torch
from safetensors.torch import save_file

import video_swinv2 as vs
from tests.closeness import assert_close, assert_same
from tests.weights.released import (
    CLASSES,
    as_shards,
    hugging_face_config,
    microsoft_state,
    ours,
    randomise,
    timm_model,
    torchvision_model,
)
from video_swinv2.errors import UserError

NATIVE = [(4, 4), (4, 4), (4, 4), (2, 2)]


def fresh(**changes):
    """A model of another window than the file's, so that a stale buffer or normaliser would show."""
    settings = {"num_classes": CLASSES, "image_size": 64, "window": 4, "cpb_norm": [(9, 9)] * 4} | changes
    return vs.create_model("swinv2_nano", **settings).eval()


def same(model, reference, account, size=64):
    """Equal outputs, not of zeros; every tensor of the model accounted for once."""
    x = torch.randn(2, 3, size, size)
    with torch.no_grad():
        expected = reference(x)
        expected = getattr(expected, "logits", expected)
        assert expected.std() > 0.05
        assert_close(model(x), expected)
    assert sorted([*account.loaded, *account.inflated, *account.initialised]) == sorted(model.state_dict())


def test_microsoft_with_buffers_of_another_window(tmp_path):
    reference = ours(cpb_norm=[(12, 12), (12, 12), (12, 12), (6, 6)])
    torch.save({"model": microsoft_state(reference, window=8)}, tmp_path / "a.pth")
    model = fresh()
    account = vs.load_weights(model, tmp_path / "a.pth")
    same(model, reference, account)
    assert account.layout == "Microsoft SwinV2"
    assert model.cpb_norm == reference.cpb_norm
    assert len(account.derived) == 8 * 2 + 1
    assert not account.unused


@pytest.mark.parametrize("tables", [True, False])
def test_simmim_of_the_zoo(tmp_path, tables):
    """`rpe_mlp`, a mask token and a decoder; without tables the layout itself tells 192 pixels and window 12."""
    reference = ours(cpb_norm=[(12, 12), (12, 12), (12, 12), (6, 6)], num_classes=0)
    state = microsoft_state(reference, window=8) if tables else reference.state_dict()
    state = {f"encoder.{name.replace('cpb_mlp', 'rpe_mlp')}": t for name, t in state.items()}
    state |= {"encoder.mask_token": torch.zeros(1, 1, 32), "decoder.0.weight": torch.zeros(3072, 256, 1, 1)}
    torch.save({"model": state}, tmp_path / "pretrained.pth")
    model = fresh(num_classes=0)
    account = vs.load_weights(model, tmp_path / "pretrained.pth")
    same(model, reference, account)
    assert account.layout == "SimMIM"
    assert sorted(account.unused) == ["decoder.0.weight", "mask_token"]
    assert ("tables" if tables else "zoo of SimMIM") in account.notes[0]


def test_fine_tuned_simmim_is_known_by_its_name_or_refused(tmp_path):
    reference = ours(cpb_norm=[(12, 12), (12, 12), (12, 12), (6, 6)])
    state = {name.replace("cpb_mlp", "rpe_mlp"): t for name, t in reference.state_dict().items()}
    torch.save({"model": state}, tmp_path / "finetune_swinv2_base_22k_500k.pth")
    torch.save({"model": state}, tmp_path / "my_finetune.pth")
    model = fresh()
    same(model, reference, vs.load_weights(model, tmp_path / "finetune_swinv2_base_22k_500k.pth"))
    with pytest.raises(UserError, match="normaliser is not in the file"):
        vs.load_weights(fresh(), tmp_path / "my_finetune.pth")


def test_timm_hub_folder(tmp_path):
    reference = timm_model()
    save_file(reference.state_dict(), tmp_path / "model.safetensors")
    arguments = {"img_size": 64, "window_size": 4, "depths": [2, 2, 2, 2]}
    config = {"architecture": "swinv2_tiny_window8_256", "model_args": arguments, "label_names": list("abcdef")}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = fresh()
    account = vs.load_weights(model, tmp_path, classes=list("fedcba"))
    assert account.layout == "timm"
    assert model.cpb_norm == NATIVE
    same(model, lambda x: reference(x).flip(1), account)


def test_timm_training_checkpoint_takes_the_averaged_weights(tmp_path):
    """`state_dict_ema` before `state_dict`; arch and args tell the sizes, and an argparse.Namespace runs nothing."""
    reference = timm_model(pretrained=(8, 8, 8, 8))
    arguments = argparse.Namespace(img_size=64, model_kwargs={"window_size": 4, "pretrained_window_sizes": [8] * 4})
    states = {"state_dict": timm_model().state_dict(), "state_dict_ema": reference.state_dict()}
    states["state_dict"]["norm.bias"] += 1
    content = {"arch": "swinv2_tiny_window8_256", "args": arguments, "epoch": 3, **states}
    torch.save(content, tmp_path / "model_best.pth.tar")
    model = fresh()
    account = vs.load_weights(model, tmp_path / "model_best.pth.tar")
    same(model, reference, account)
    assert model.cpb_norm == [(8, 8)] * 4
    assert "state_dict_ema" in account.notes[0]


@pytest.mark.parametrize("kind", ["classifier", "bare", "masked"])
@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_hugging_face_folder(tmp_path, kind, suffix):
    from transformers import Swinv2ForImageClassification, Swinv2ForMaskedImageModeling, Swinv2Model

    labels = dict(enumerate("abcdef"))
    config = hugging_face_config(pretrained_window_sizes=[12, 12, 12, 6], num_labels=6, id2label=labels)
    make = {"classifier": Swinv2ForImageClassification, "bare": Swinv2Model, "masked": Swinv2ForMaskedImageModeling}
    reference = randomise(make[kind](config))
    reference.save_pretrained(tmp_path)
    if suffix == "bin":
        (tmp_path / "model.safetensors").unlink()
        torch.save(reference.state_dict(), tmp_path / "pytorch_model.bin")
    model = fresh(num_classes=6 if kind == "classifier" else 0)
    account = vs.load_weights(model, tmp_path, classes=list("abcdef") if kind == "classifier" else None)
    assert account.layout == "Hugging Face"
    assert model.cpb_norm == [(12, 12), (12, 12), (12, 12), (6, 6)]
    if kind == "classifier":
        same(model, reference, account)
        return
    body = reference if kind == "bare" else reference.swinv2
    same(model, lambda x: body(x).pooler_output if kind == "bare" else body(x).last_hidden_state.mean(1), account)
    assert account.unused.keys() == (
        {"mask_token", "decoder.0.weight", "decoder.0.bias"} if kind == "masked" else set()
    )


@pytest.mark.parametrize("earlier", [None, [0, 0, 0, 0], [12, 6, 0, 0]])
def test_hugging_face_folder_of_two_stages(tmp_path, earlier):
    """`pretrained_window_sizes` has four entries by default, of which the model uses one for each of its stages."""
    from transformers import Swinv2ForImageClassification

    sizes = {} if earlier is None else {"pretrained_window_sizes": earlier}
    config = hugging_face_config(depths=(2, 2), num_heads=(1, 2), num_labels=3, **sizes)
    reference = randomise(Swinv2ForImageClassification(config))
    reference.save_pretrained(tmp_path)
    model = vs.SwinV2.from_pretrained(tmp_path)
    assert (model.depths, model.window) == ((2, 2), (4, 4))
    assert model.cpb_norm == ([(12, 12), (6, 6)] if earlier == [12, 6, 0, 0] else [(4, 4), (4, 4)])
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert_close(model(x), reference(x).logits)


def test_hugging_face_masked_model_fills_a_simmim(tmp_path):
    from transformers import Swinv2ForMaskedImageModeling

    reference = randomise(Swinv2ForMaskedImageModeling(hugging_face_config()))
    reference.save_pretrained(tmp_path)
    simmim = vs.SimMIM(fresh(num_classes=0), 32)
    account = vs.load_weights(simmim.encoder, tmp_path)
    assert "mask_token" in account.loaded
    assert torch.equal(simmim.encoder.mask_token, reference.swinv2.embeddings.mask_token)


def test_hugging_face_feature_backbone(tmp_path):
    """It has no final norm; what it does have gives its feature maps."""
    from transformers import Swinv2Backbone

    stages = ["stage1", "stage2", "stage3", "stage4"]
    reference = randomise(Swinv2Backbone(hugging_face_config(out_features=stages)))
    reference.save_pretrained(tmp_path)
    model = fresh(num_classes=0)
    account = vs.load_weights(model, tmp_path)
    assert sorted(account.initialised) == ["norm.bias", "norm.weight"]
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        for got, expected in zip(model.forward_pyramid(x), reference(x).feature_maps, strict=True):
            assert_close(got, expected)


def test_torchvision_without_its_keys_bias(tmp_path):
    """128 pixels, where torchvision does not pad up to its window; the bias of the key says nothing there."""
    reference = torchvision_model()
    save_file(reference.state_dict(), tmp_path / "swin.safetensors")
    model = fresh()
    account = vs.load_weights(model, tmp_path / "swin.safetensors")
    same(model, reference, account, size=128)
    assert account.layout == "torchvision"
    assert model.cpb_norm == [(4, 4)] * 4
    assert len(account.unused) == 8
    assert set(account.unused.values()) == {"torchvision sets the key's bias to zero in every forward pass"}
    bare = {name: t for name, t in reference.state_dict().items() if "coords_table" not in name}
    save_file(bare, tmp_path / "bare.safetensors")
    vs.load_weights(model, tmp_path / "bare.safetensors")
    assert model.cpb_norm == [(8, 8)] * 4


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"module." + name: t for name, t in state.items()},
        lambda state: {"state_dict": {"module._orig_mod." + name: t for name, t in state.items()}},
        lambda state: {"state_dict": {"model." + name: t for name, t in state.items()}, "epoch": 3},
        lambda state: {"module": state, "global_steps": 7},
        lambda state: {"model": {"state_dict": state}},
    ],
)
def test_wrapped(tmp_path, wrap):
    reference = ours()
    torch.save(wrap(microsoft_state(reference, window=4)), tmp_path / "a.pth")
    model = fresh()
    same(model, reference, vs.load_weights(model, tmp_path / "a.pth"))


def test_extra_norms_of_huge_and_giant_under_both_names(tmp_path):
    sizes = {"embed_dim": 32, "depths": (2, 2, 4, 2), "num_heads": (1, 2, 4, 8), "extra_norm_every": 2}
    reference = randomise(vs.SwinV2(**sizes, num_classes=3, image_size=64, window=4))
    for name in ("enorm", "norm3"):
        state = {key.replace(".enorm.", f".{name}."): t for key, t in reference.state_dict().items()}
        torch.save(state, tmp_path / f"{name}.pth")
        model = vs.SwinV2.from_pretrained(tmp_path / f"{name}.pth", image_size=64, window=4, cpb_norm=NATIVE)
        assert model.extra_norm_every == 2
        x = torch.randn(1, 3, 64, 64)
        with torch.no_grad():
            assert_close(model(x), reference(x))
        assert_same(model.state_dict(), reference.state_dict())


def test_shards_of_a_folder(tmp_path):
    reference = ours()
    config = {"architecture": "swinv2_tiny_window8_256", "model_args": {"img_size": 64, "window_size": 4}}
    folder = as_shards(dict(reference.state_dict()), tmp_path / "sharded", config)
    model = fresh()
    same(model, reference, vs.load_weights(model, folder))

    index = folder / "model.safetensors.index.json"
    whole = json.loads(index.read_text())
    for name in ("../outside.safetensors", "/etc/passwd", "..\\outside", "", ".."):
        weight_map = whole["weight_map"] | {"norm.weight": name}
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(UserError, match="not a file of this folder"):
            vs.load_weights(fresh(), folder)
    index.write_text(
        json.dumps({"weight_map": whole["weight_map"] | {"layers.9.weight": "model-00001-of-00002.safetensors"}})
    )
    with pytest.raises(UserError, match=r"layers\.9\.weight is in the index but in none of its files"):
        vs.load_weights(fresh(), folder)
    index.write_text(json.dumps(whole))
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match=r"of-00002\.safetensors does not exist"):
        vs.load_weights(fresh(), folder)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"backbone.layers.0.blocks.0.attn.relative_position_bias_table": (9, 3)}, "Swin V1"),
        (
            {"backbone.patch_embed.proj.weight": (8, 3, 2, 4, 4), "layers.0.attn.relative_position_bias_table": (9, 3)},
            "Video Swin V1",
        ),
        ({"features.1.0.attn.relative_position_bias_table": (9, 3), "features.0.0.weight": (8, 3, 4, 4)}, "Swin V1"),
        ({"backbone.stages.0.blocks.0.attn.w_msa.cpb_mlp.0.weight": (512, 2)}, "OpenMMLab"),
        (
            {"patch_embed.proj.weight": (8, 3, 4, 4), "stages.0.blocks.0.attn.meta_mlp.fc1.weight": (384, 2)},
            "swinv2_cr",
        ),
        ({"patch_embed.proj.weight": (8, 3, 16, 16), "blocks.0.attn.qkv.weight": (24, 8)}, "no log-CPB"),
        ({"conv1.weight": (8, 3, 7, 7)}, "'conv1.weight'"),
    ],
)
def test_foreign_networks_are_refused_with_the_reason(tmp_path, tensors, words):
    torch.save({name: torch.zeros(shape) for name, shape in tensors.items()}, tmp_path / "a.pth")
    with pytest.raises(UserError, match=words) as caught:
        vs.load_weights(fresh(), tmp_path / "a.pth")
    assert "\n" not in str(caught.value)
