"""Nothing outside OUT is written, replaced or deleted, whatever lists, states and records say."""

from pathlib import Path

import pytest

from video_swinv2.errors import UserError
from video_swinv2.files import path_under

OUTSIDE = ["/etc/passwd", "//etc", "..", "../x", "a/../../x", "a/..", "a/../b", "", ".", "a\0b"]


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_path_that_leaves_its_root_is_refused_in_one_line_that_names_the_file_and_the_path(tmp_path, name):
    with pytest.raises(UserError) as refused:
        path_under(tmp_path, name, "list.csv, line 3")
    assert str(refused.value).startswith("list.csv, line 3: ")
    assert repr(name) in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["a", "a/b.mp4", "./a", "a..b", "..a", "a/.b", "no such folder/file", "x\ny"])
def test_a_path_inside_its_root_is_returned(tmp_path, name):
    assert path_under(tmp_path, name, "list") == tmp_path / name


def test_a_link_that_leads_out_is_refused_and_one_that_stays_inside_is_not(tmp_path):
    root, outside = tmp_path / "root", tmp_path / "outside"
    (root / "inside").mkdir(parents=True)
    outside.mkdir()
    (root / "out").symlink_to(outside)
    (root / "nowhere").symlink_to(tmp_path / "root2")  # a prefix of its name is that of the root
    (root / "up").symlink_to("..")
    (root / "in").symlink_to("inside")
    for name in ("out/a", "out", "nowhere", "nowhere/a", "up", "up/outside/a", "in/../out/a"):
        with pytest.raises(UserError, match=r"^state: "):
            path_under(root, name, "state")
    assert path_under(root, "in/a", "state") == root / "in/a"


def test_the_root_may_itself_be_reached_through_a_link(tmp_path, monkeypatch):
    (tmp_path / "disk").mkdir()
    (tmp_path / "root").symlink_to("disk")
    assert path_under(tmp_path / "root", "a/b", "list") == tmp_path / "root/a/b"
    monkeypatch.chdir(tmp_path)  # a relative root is one as well
    assert path_under(Path("root"), "a", "list") == Path("root/a")
