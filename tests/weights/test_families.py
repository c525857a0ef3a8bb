"""Normalisers of the released files: the table against the specification, timm's own models and configurations."""

from __future__ import annotations

import pytest
import timm
import torch

import video_swinv2 as vs
from tests.weights.released import ours
from video_swinv2.errors import UserError
from video_swinv2.weights.families import classes_from_json, config_from_extras, config_from_json, released_config_for
from video_swinv2.weights.formats import norm_from_tables


@pytest.mark.parametrize(
    ("name", "image_size", "window", "norms"),
    [
        ("swinv2_tiny_patch4_window8_256", 256, 8, (8, 8, 8, 8)),
        ("swinv2_small_patch4_window16_256", 256, 16, (16, 16, 16, 8)),
        ("swinv2_base_patch4_window12_192_22k", 192, 12, (12, 12, 12, 6)),
        ("swinv2_large_patch4_window12to24_192to384_22kto1k_ft", 384, 24, (12, 12, 12, 6)),
        ("swinv2-base-patch4-window12to16-192to256-22kto1k-ft", 256, 16, (12, 12, 12, 6)),
        ("swinv2_base_window8_256.ms_in1k", 256, 8, (8, 8, 8, 8)),
        ("swinv2_giant_22k_500k", 192, 12, (12, 12, 12, 6)),
        ("finetune_swinv2_base_1k_125k", 224, 14, (12, 12, 12, 6)),
    ],
)
def test_released_names(name, image_size, window, norms):
    training = released_config_for(name)
    assert training.image_size == (image_size, image_size)
    assert training.window == window
    assert training.cpb_norm == [(norm, norm) for norm in norms]


def test_names_that_were_never_released_are_unknown():
    for name in ("swinv2_tiny_patch4_window12_192_22k", "swinv2_tiny_22k_125k", "swinv2_small_22k_125k", "my_base"):
        assert released_config_for(name) is None
    for name in ("swinv2_huge_1kper10_125k", "swinv2_giant_1kper20_125k", "finetune_swinv2_large_1k_125k"):
        assert released_config_for(name) is None


def test_every_swinv2_of_timm_is_in_the_table():
    names = timm.list_models("swinv2_*", exclude_filters="swinv2_cr*", pretrained=True)
    assert len(names) == 12
    for name in names:
        assert released_config_for(name) == released_config_for(name.split(".")[0])
        assert released_config_for(name).image_size == timm.get_pretrained_cfg(name).input_size[1:]


@pytest.mark.parametrize("name", ["swinv2_tiny_window8_256", "swinv2_tiny_window16_256", "swinv2_base_window12_192"])
def test_normalisers_are_the_windows_that_timm_builds(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    own = [tuple(stage.blocks[0].attn.window_size) for stage in model.layers]
    assert released_config_for(name).cpb_norm == own
    assert not any(stage.blocks[0].attn.pretrained_window_size[0] for stage in model.layers)


def test_the_normaliser_of_a_table_is_read_back_in_half_precision():
    from timm.models.swin_transformer_v2 import SwinTransformerV2

    sizes = {"img_size": 192, "window_size": 24, "pretrained_window_sizes": (12, 12, 12, 6)}
    model = SwinTransformerV2(**sizes, embed_dim=32, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1))
    tables = {n: b.half() for n, b in model.named_buffers() if n.endswith("relative_coords_table")}
    assert norm_from_tables(tables) == [(12, 12), (12, 12), (12, 12), (6, 6)]


@pytest.mark.parametrize("broken", [torch.zeros(3), torch.zeros(1, 7, 7, 2), torch.full((1, 7, 7, 2), torch.inf)])
def test_damaged_tables_tell_nothing(broken):
    assert norm_from_tables({"layers.0.blocks.0.attn.relative_coords_table": broken}) is None


def test_configurations_that_say_too_little_tell_nothing():
    assert config_from_json({"model_type": "swinv2", "image_size": 256}) is None
    assert config_from_json({"model_type": "swinv2", "image_size": [256, 192], "window_size": 8}).cpb_norm is None
    assert config_from_json({"architecture": "resnet50"}) is None
    assert (
        config_from_extras({"config": {"MODEL": {"SWINV2": {"WINDOW_SIZE": "8"}}, "DATA": {"IMG_SIZE": 256}}}) is None
    )
    assert config_from_extras({"arch": "swin_tiny_patch4_window7_224", "args": None}) is None


def test_earlier_windows_are_those_of_the_stages():
    """All three libraries look them up by the number of the stage, so what more there is has no effect."""
    earlier, sizes = [12, 6, 3, 3], {"img_size": 192, "window_size": 12}
    hugging_face = {"model_type": "swinv2", "image_size": 192, "window_size": 12, "pretrained_window_sizes": earlier}
    timm = {"pretrained_window_sizes": earlier} | sizes
    microsoft = {"WINDOW_SIZE": 12, "PRETRAINED_WINDOW_SIZES": earlier}
    for depths, norms in (([2, 2], earlier[:2]), ([2, 2, 6], earlier[:3]), (None, earlier)):
        given = {} if depths is None else {"depths": depths}
        upper = {} if depths is None else {"DEPTHS": depths}
        for found in (
            config_from_json(hugging_face | given),
            config_from_json({"architecture": "swinv2_tiny_window8_256", "model_args": timm | given}),
            config_from_extras({"config": {"MODEL": {"SWINV2": microsoft | upper}, "DATA": {"IMG_SIZE": 192}}}),
        ):
            assert found.cpb_norm == [(norm, norm) for norm in norms]
    assert config_from_json(hugging_face | {"depths": "2, 2"}) is None


def test_class_names_of_configurations():
    assert classes_from_json({"id2label": {"1": "b", "0": "a"}}) == ("a", "b")
    assert classes_from_json({"label_names": ["a", "b"]}) == ("a", "b")
    assert classes_from_json({"id2label": {"0": "LABEL_0", "1": "LABEL_1"}}) == ()
    assert classes_from_json({"label_names": {"0": "a", "2": "c"}}) == ()
    assert classes_from_json({"id2label": 3}) == ()


def test_what_stands_in_the_file_goes_before_its_name(tmp_path):
    """A file that was trained on with another window and kept the name of a released one."""
    from tests.weights.released import microsoft_state

    state = microsoft_state(ours(cpb_norm=[(6, 6), (6, 6), (6, 6), (3, 3)]), window=8)
    torch.save(state, tmp_path / "swinv2_tiny_patch4_window8_256.pth")
    model = ours()
    account = vs.load_weights(model, tmp_path / "swinv2_tiny_patch4_window8_256.pth")
    assert model.cpb_norm == [(6, 6), (6, 6), (6, 6), (3, 3)]
    assert "coordinate tables" in account.notes[0]


def test_name_given_and_impossible_normalisers(tmp_path):
    torch.save(ours().state_dict(), tmp_path / "swinv2_tiny_patch4_window8_256.pth")
    model = ours()
    account = vs.load_weights(model, tmp_path / "swinv2_tiny_patch4_window8_256.pth")
    assert model.cpb_norm == [(8, 8)] * 4
    assert "model zoo" in account.notes[0]
    account = vs.load_weights(model, tmp_path / "swinv2_tiny_patch4_window8_256.pth", cpb_norm=[(4, 4)] * 4)
    assert "given; Microsoft's model zoo would say" in account.notes[0]
    for wrong in ([(0, 4)] * 4, [(4,)] * 4, [(4, 4)] * 3, [(4, 4, 4)] * 4):
        with pytest.raises(UserError):
            vs.load_weights(model, tmp_path / "swinv2_tiny_patch4_window8_256.pth", cpb_norm=wrong)
    assert model.cpb_norm == [(4, 4)] * 4
