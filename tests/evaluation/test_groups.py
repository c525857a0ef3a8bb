"""The groups of a data set in a test: recorded with the scores, counted as sources, and compared with train's."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.evaluation.small import N_VIDEOS, quick
from video_swinv2.evaluation.testing import run_test
from video_swinv2.report.scores import load_test


def test_groups_reach_the_scores_and_a_leak_is_told(
    model_path: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    groups = [f"room {n // 3}" for n in range(N_VIDEOS)]
    lines = ["path\tlabel\tgroup"]
    for line, group in zip((data / "test.txt").read_text().splitlines(), groups, strict=True):
        path, _, label = line.rpartition(" ")
        quoted = path.replace('"', '""')
        lines.append(f'"{data}/{quoted}"\t{label}\t{group}')
    (tmp_path / "test.csv").write_text("\n".join(lines))
    (tmp_path / "train.csv").write_text("path,label,group\na.mp4,0,room 1\nb.mp4,1,room 9\n")
    (tmp_path / "classes.txt").write_text((data / "classes.txt").read_text())
    out = tmp_path / "out"
    result = run_test(model_path, tmp_path, protocol="center-1x1", split="test", out=out, overrides=quick())
    assert "1 groups are in both train and test, such as 'room 1'" in capsys.readouterr().err
    assert load_test(out / "scores.npz").metadata["origins"] == groups
    assert result["sources"] == len(set(groups)) == 3
