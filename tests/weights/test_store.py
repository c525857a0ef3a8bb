"""Model files: what was saved comes back, at any window; what is not a model file is refused."""

import pytest
import torch
from safetensors.torch import save_file

import video_swinv2 as vs
from tests.closeness import assert_close, assert_same
from video_swinv2.errors import UserError

PREPROCESSING = vs.Preprocessing(frames=8, frame_stride=2, image_size=(64, 64))


@pytest.fixture
def saved(tmp_path):
    model = vs.create_model("swinv2_nano", num_classes=2, frames=8, image_size=64, window=(2, 4, 4)).eval()
    for block in model.blocks():
        torch.nn.init.ones_(block.norm1.weight)
    path = tmp_path / "folder" / "model.safetensors"
    vs.save_model(model, path, classes=["x", "y"], preprocessing=PREPROCESSING, provenance={"run": "r1"})
    return path, model


def test_round_trip(saved):
    path, model = saved
    loaded = vs.load_model(path.parent)
    assert not loaded.training
    assert loaded.architecture() == model.architecture()
    x = torch.randn(1, 3, 8, 64, 64)
    with torch.no_grad():
        assert_close(loaded(x), model(x))
    assert_same(loaded.state_dict(), model.state_dict())
    card = vs.read_card(path)
    assert card.classes == ("x", "y")
    assert card.preprocessing == PREPROCESSING
    assert card.provenance == {"run": "r1"}
    assert [p.name for p in path.parent.iterdir()] == ["model.safetensors"], "nothing is left beside the file"


def test_another_window_keeps_the_normaliser(saved):
    path, model = saved
    other = vs.load_model(path, window=(4, 8, 8), frames=16, image_size=128)
    assert other.cpb_norm == model.cpb_norm
    assert other.window == (4, 8, 8)
    assert other(torch.randn(1, 3, 16, 128, 128)).shape == (1, 2)


def test_refusals(saved, tmp_path):
    path, model = saved
    with pytest.raises(UserError, match="no such model file"):
        vs.load_model(tmp_path / "nothing.safetensors")
    with pytest.raises(UserError, match="one name per class"):
        vs.save_model(model, tmp_path / "bad.safetensors", classes=["x"], preprocessing=PREPROCESSING)
    save_file({"a": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    with pytest.raises(UserError, match="no architecture"):
        vs.load_model(tmp_path / "foreign.safetensors")
    (tmp_path / "short.safetensors").write_bytes(path.read_bytes()[:5000])
    with pytest.raises(UserError, match="not a complete safetensors file"):
        vs.load_model(tmp_path / "short.safetensors")
    (tmp_path / "blocker").write_text("a file where a folder is needed")
    with pytest.raises(UserError, match="blocker: cannot create the folder"):
        vs.save_model(model, tmp_path / "blocker" / "m.safetensors", classes=["x", "y"], preprocessing=PREPROCESSING)
