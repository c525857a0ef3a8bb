"""A larger head mapped to a smaller one by row numbers, as ImageNet-22K's to ImageNet-1K's, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import video_swinv2 as vs
from tests.closeness import assert_close
from tests.weights.released import CLASSES, as_shards, microsoft_state, ours, timm_model
from video_swinv2.cli import main

MAP = (4, 0, 5, 0)  # in an order of its own; two classes may share a row


@pytest.fixture
def checkpoint(tmp_path: Path) -> tuple[Path, vs.SwinV2]:
    reference = ours()
    torch.save({"model": microsoft_state(reference, window=4)}, tmp_path / "large.pth")
    return tmp_path / "large.pth", reference


def convert(source: Path, out: Path, class_map: str, *options: object) -> int:
    file = out.with_name("map.txt")
    file.write_text(class_map)
    return main(["convert", str(source), str(out), "--class-map", str(file), *map(str, options)])


def test_rows_are_those_of_the_map_in_its_order(checkpoint: tuple[Path, vs.SwinV2], tmp_path: Path) -> None:
    source, reference = checkpoint
    assert convert(source, tmp_path / "o.safetensors", "\n".join(map(str, MAP)) + "\n") == 0
    model = vs.load_model(tmp_path / "o.safetensors")
    assert model.num_classes == len(MAP)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert_close(model(x), reference(x)[:, list(MAP)])
    assert torch.equal(model.head.weight, reference.head.weight[list(MAP)])
    card = vs.read_card(tmp_path / "o.safetensors")
    assert card.classes == ()
    assert f"head: {len(MAP)} of the file's {CLASSES} classes, by the class map" in card.provenance["notes"]  # type: ignore[operator]  # plain data


def test_names_of_the_rows_are_given_or_the_files_own(
    checkpoint: tuple[Path, vs.SwinV2], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "names.txt").write_text("a\nb\nc\n")
    assert convert(checkpoint[0], tmp_path / "o.safetensors", "5\n1\n3\n", "--classes", tmp_path / "names.txt") == 0
    assert vs.read_card(tmp_path / "o.safetensors").classes == ("a", "b", "c")
    assert torch.equal(vs.load_model(tmp_path / "o.safetensors").head.bias, checkpoint[1].head.bias[[5, 1, 3]])

    config = {
        "architecture": "swinv2_tiny_window8_256",
        "model_args": {"img_size": 64, "window_size": 4},
        "label_names": [f"n{i}" for i in range(CLASSES)],
    }
    folder = as_shards(dict(timm_model().state_dict()), tmp_path / "timm", config)
    assert convert(folder, tmp_path / "p.safetensors", "5\n1\n") == 0
    assert vs.read_card(tmp_path / "p.safetensors").classes == ("n5", "n1")

    assert convert(checkpoint[0], tmp_path / "q.safetensors", "5\n1\n", "--classes", tmp_path / "names.txt") == 2
    assert "3 names for the 2 rows" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "code", "words"),
    [
        ("0\n6\n", 1, "the class map has row 6, the file 6 rows"),
        ("0\n-1\n", 2, "line 2: '-1' is not a row number"),
        ("0\nn01440764\n", 2, "line 2: 'n01440764' is not a row number"),
        ("\n", 2, "holds no row numbers"),
    ],
)
def test_maps_that_are_refused(
    text: str,
    code: int,
    words: str,
    checkpoint: tuple[Path, vs.SwinV2],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert convert(checkpoint[0], tmp_path / "o.safetensors", text) == code
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert not (tmp_path / "o.safetensors").exists()


def test_a_file_without_a_head_has_nothing_to_map(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    vs.save_model(
        ours(num_classes=0), tmp_path / "a.safetensors", classes=[], preprocessing=vs.Preprocessing(None, 1, (64, 64))
    )
    assert convert(tmp_path / "a.safetensors", tmp_path / "o.safetensors", "0\n") == 1
    assert "no classification head; omit the class map" in capsys.readouterr().err
