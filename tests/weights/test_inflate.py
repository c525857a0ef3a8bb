"""Loading: inflation is exact, every key is explained, everything else is refused."""

from pathlib import Path

import pytest
import torch

import video_swinv2 as vs
from tests.closeness import assert_close, assert_same
from tests.weights.released import randomise
from video_swinv2.errors import UserError
from video_swinv2.models.position_bias import log_coordinates, window_offsets

PREPROCESSING = vs.Preprocessing(frames=None, frame_stride=1, image_size=(64, 64))


def image_model(**changes):
    return randomise(vs.create_model("swinv2_nano", **({"num_classes": 4, "image_size": 64, "window": 4} | changes)))


@pytest.fixture
def image_file(tmp_path):
    model = image_model()
    vs.save_model(model, tmp_path / "image.safetensors", classes=["a", "b", "c", "d"], preprocessing=PREPROCESSING)
    return tmp_path / "image.safetensors", model


@pytest.mark.parametrize(
    ("patch", "window", "frames"),
    [
        (1, 8, 8),
        (2, 8, 16),
        (1, 4, 16),
        (2, 4, 16),  # time has windows and shifts
        (1, 4, 7),  # the last window in time is padded
        (2, 3, 17),  # so is the last patch
        (2, 8, 1),
        (1, 1, 3),
    ],
)
def test_still_clip_equals_image(image_file, patch, window, frames):
    path, image = image_file
    clip = vs.create_model(
        "swinv2_nano", num_classes=4, frames=16, image_size=64, patch_size=(patch, 4, 4), window=(window, 4, 4)
    ).eval()
    vs.load_weights(clip, path)
    x = torch.randn(2, 3, 72, 64)
    with torch.no_grad():
        expected = image.forward_features(x)
        got = clip.forward_features(x[:, :, None].expand(-1, -1, frames, -1, -1))
        assert expected.std() > 0.5
        assert_close(got, expected[:, None].expand_as(got))


def test_order_in_time_is_free_at_inflation_and_matters_after_learning(image_file):
    path, _ = image_file
    clip = vs.create_model(
        "swinv2_nano", num_classes=4, frames=4, image_size=64, patch_size=(1, 4, 4), window=(4, 4, 4)
    )
    vs.load_weights(clip.eval(), path)
    x = torch.randn(1, 3, 4, 64, 64)
    with torch.no_grad():
        assert_close(clip(x[:, :, [2, 0, 3, 1]]), clip(x))
        for block in clip.blocks():
            block.attn.cpb_mlp[0].weight[:, 0].normal_()
        assert (clip(x) - clip(x[:, :, [2, 0, 3, 1]])).abs().max() > 1e-3


def test_time_noise_keeps_still_clips_and_tells_a_clip_from_its_reversal(image_file):
    path, image = image_file
    clips = []
    for noise in (0.0, 1.0):
        clip = vs.create_model("swinv2_nano", num_classes=4, frames=2, image_size=64, window=(2, 4, 4)).eval()
        account = vs.load_weights(clip, path, time_noise=noise, seed=3)
        clips.append(clip)
    assert "sums to zero over time" in account.inflated["patch_embed.proj.weight"]
    plain, noisy = (clip.patch_embed.proj.weight for clip in clips)
    assert (noisy - plain).std().item() == pytest.approx(plain.std().item(), rel=0.1)
    x = torch.randn(2, 3, 2, 64, 64)
    still = x[:, :, :1].expand(-1, -1, 2, -1, -1)
    with torch.no_grad():
        assert_close(clips[1](still), image(x[:, :, 0]))
        assert_close(clips[0](x.flip(2)), clips[0](x))
        assert (clips[1](x) - clips[1](x.flip(2))).abs().max() > 1e-2


def test_time_noise_without_inflation_is_refused(image_file):
    path, _ = image_file
    for patch in ({"frames": 8, "patch_size": (1, 4, 4)}, {}):
        model = vs.create_model("swinv2_nano", num_classes=4, image_size=64, window=4, **patch)
        with pytest.raises(UserError, match="time_noise"):
            vs.load_weights(model, path, time_noise=1.0)


def test_account_explains_every_key(image_file):
    path, image = image_file
    clip = vs.create_model("swinv2_nano", num_classes=9, frames=8, image_size=64)
    account = vs.load_weights(clip, path, classes=[f"c{i}" for i in range(9)])
    assert sorted(account.inflated) == sorted(
        ["patch_embed.proj.weight"] + [n for n in image.state_dict() if n.endswith("cpb_mlp.0.weight")]
    )
    assert sorted(account.initialised) == ["head.bias", "head.weight"]
    assert sorted(account.unused) == ["head.bias", "head.weight"]
    assert len(account.loaded) + len(account.inflated) + len(account.initialised) == len(clip.state_dict())
    assert "zero column for the offset in time" in str(account)
    assert clip.cpb_norm == [(4, 4, 4), (4, 4, 4), (4, 4, 4), (4, 2, 2)]


def test_simmim_file_goes_into_a_clip_model(tmp_path):
    pretrained = vs.SimMIM(image_model(num_classes=0), 32)
    vs.save_model(pretrained, tmp_path / "simmim.safetensors", classes=[], preprocessing=PREPROCESSING)
    clip = vs.create_model("swinv2_nano", num_classes=3, frames=8, image_size=64)
    account = vs.load_weights(clip, tmp_path / "simmim.safetensors")
    assert sorted(account.unused) == ["decoder.0.bias", "decoder.0.weight", "mask_token"]
    assert torch.equal(clip.layers[1].blocks[0].attn.qkv.weight, pretrained.encoder.layers[1].blocks[0].attn.qkv.weight)
    with pytest.raises(UserError, match="no classifier"):
        vs.load_model(tmp_path / "simmim.safetensors")


def test_microsoft_files_bring_their_normaliser(tmp_path):
    """Wrapped, prefixed, with stale tables and masks, and the old name of the bias network."""
    image = image_model(window=4, cpb_norm=[(12, 12), (12, 12), (12, 12), (6, 6)])
    state = {
        f"module.encoder.{k.replace('cpb_mlp', 'rpe_mlp')}": v for k, v in image.state_dict().items() if "head" not in k
    }
    for i, (window, norm) in enumerate([(16, 12), (16, 12), (16, 12), (8, 6)]):
        table = log_coordinates(window_offsets((window, window)), (norm, norm)).view(
            1, 2 * window - 1, 2 * window - 1, 2
        )
        state[f"module.encoder.layers.{i}.blocks.0.attn.relative_coords_table"] = table
        state[f"module.encoder.layers.{i}.blocks.0.attn.relative_position_index"] = torch.zeros(4, 4, dtype=torch.int64)
    state["module.encoder.mask_token"] = torch.zeros(1, 1, 32)
    torch.save({"model": state, "epoch": 3}, tmp_path / "official.pth")
    fresh = vs.create_model("swinv2_nano", num_classes=0, image_size=64, window=4).eval()
    account = vs.load_weights(fresh, tmp_path / "official.pth")
    assert fresh.cpb_norm == [(12, 12), (12, 12), (12, 12), (6, 6)]
    assert len(account.derived) == 8
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert_close(fresh.forward_features(x), image.forward_features(x))
    assert_same(fresh.state_dict(), {name: t for name, t in image.state_dict().items() if "head" not in name})


def test_normaliser_is_never_guessed(tmp_path):
    image = image_model()
    torch.save(image.state_dict(), tmp_path / "bare.pth")
    clip = vs.create_model("swinv2_nano", num_classes=4, frames=8, image_size=64)
    with pytest.raises(UserError, match="normaliser is not in the file"):
        vs.load_weights(clip, tmp_path / "bare.pth")
    vs.load_weights(clip, tmp_path / "bare.pth", cpb_norm=[(4, 4), (4, 4), (4, 4), (2, 2)])
    assert clip.cpb_norm[3] == (4, 2, 2)


def test_head_follows_the_class_names(image_file):
    path, image = image_file
    other = vs.create_model("swinv2_nano", num_classes=4, image_size=64, window=4).eval()
    vs.load_weights(other, path, classes=["d", "b", "a", "c"])
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert_close(other(x), image(x)[:, [3, 1, 0, 2]])
    assert torch.equal(other.head.weight, image.head.weight[[3, 1, 0, 2]])


def test_the_account_says_what_is_known_of_the_order_of_classes(image_file, tmp_path):
    path, image = image_file
    torch.save(image.state_dict(), tmp_path / "bare.pth")
    unknown = "head: class names unknown, so their order could not be checked"
    for file, classes, note in (
        (path, None, "head: the file's 4 classes, in its order"),
        (path, ["d", "b", "a", "c"], "head: 4 of the file's 4 classes, by name"),
        (tmp_path / "bare.pth", None, unknown),
        (tmp_path / "bare.pth", ["d", "b", "a", "c"], unknown),
    ):
        model = vs.create_model("swinv2_nano", num_classes=4, image_size=64, window=4)
        assert note in vs.load_weights(model, file, classes=classes, cpb_norm=image.cpb_norm).notes


@pytest.mark.parametrize(
    ("of_file", "of_model", "fix"),
    [
        ((2, 4, 4), (4, 4, 4), "2,4,4"),
        ((1, 4, 4), (1, 8, 8), "1,4,4"),
        ((4, 4), (8, 8), "4,4"),
        ((4, 4), (2, 8, 8), "2,4,4"),
    ],
)
def test_another_patch_size_is_named(tmp_path, of_file, of_model, fix):
    def build(patch, **changes):
        frames = 8 if len(patch) == 3 else None
        settings = {"num_classes": 0, "frames": frames, "image_size": 64, "patch_size": patch, "window": 4} | changes
        return vs.create_model(**({"name": "swinv2_nano"} | settings))

    preprocessing = vs.Preprocessing(8 if len(of_file) == 3 else None, 1, (64, 64))
    vs.save_model(build(of_file), tmp_path / "a.safetensors", classes=[], preprocessing=preprocessing)
    with pytest.raises(UserError) as caught:
        vs.load_weights(build(of_model), tmp_path / "a.safetensors")
    assert str(caught.value).endswith(
        f"in the model; choose the patch size of the file (model.patch_size=[{fix}] in a configuration, "
        f"--patch-size {fix} for convert)"
    )
    with pytest.raises(UserError, match=r"model\.name"):
        vs.load_weights(build(of_file, name="swinv2_tiny"), tmp_path / "a.safetensors")


class Planted:
    """Unpickling this would run code that writes a file."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return (Path.touch, (self.target,))


def test_what_is_not_explained_is_refused(tmp_path, image_file):
    path, image = image_file
    clip = vs.create_model("swinv2_nano", num_classes=4, frames=8, image_size=64)
    before = {k: v.clone() for k, v in clip.state_dict().items()}
    state = image.state_dict()
    norms = [(4, 4)] * 4
    cases = {
        "missing in the file": {k: v for k, v in state.items() if k != "layers.0.blocks.0.attn.cpb_mlp.2.weight"},
        "has no place": state | {"layers.0.blocks.0.adapter.weight": torch.zeros(3)},
        "in the file and": state | {"norm.weight": torch.ones(100)},
        "NaN": state | {"norm.weight": torch.full_like(state["norm.weight"], torch.nan)},
        "not a SwinV2": {"conv1.weight": torch.zeros(3)},
        "Swin V1": state | {"layers.0.blocks.0.attn.relative_position_bias_table": torch.zeros(3)},
    }
    for words, tensors in cases.items():
        torch.save(tensors, tmp_path / "bad.pth")
        with pytest.raises(UserError, match=words) as caught:
            vs.load_weights(clip, tmp_path / "bad.pth", cpb_norm=norms)
        assert "\n" not in str(caught.value)
    torch.save({"model": state, "extra": Planted(tmp_path / "ran")}, tmp_path / "planted.pth")
    with pytest.raises(UserError, match="ever executed"):
        vs.load_weights(clip, tmp_path / "planted.pth")
    assert not (tmp_path / "ran").exists()
    (tmp_path / "cut.safetensors").write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match="not a complete safetensors file"):
        vs.load_weights(clip, tmp_path / "cut.safetensors")
    with pytest.raises(UserError, match="no such checkpoint"):
        vs.load_weights(clip, tmp_path / "absent.pth")
    with pytest.raises(UserError, match=r"choose the model size|another architecture|missing"):
        vs.load_weights(vs.create_model("swinv2_tiny", num_classes=4, image_size=64), path)
    assert all(torch.equal(before[k], v) for k, v in clip.state_dict().items()), "a refused file changed the model"
