"""Planning: every layout yields the videos its lists name, without duplicates or leaks, and reports omissions."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest

from data_prep.groups import GroupRule
from data_prep.sources import PreparationPlan, plan_preparation
from data_prep.state import PlannedVideo, PreparationState
from tests.conftest import REPOSITORY
from video_swinv2.data.groups import origin_of
from video_swinv2.errors import UsageError

HEADER = "label,youtube_id,time_start,time_end,split,is_cc"
A, B, C, D = "-aU_xCCzkT0", "_wjbrrLyhIM", "aaa_bbb_ccc", "ddddddddddd"


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def write(path: Path, lines: Iterable[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def names(planned: PreparationPlan, split: str | None = None, *, excluded: bool = False) -> list[str]:
    return [w.name for w in planned.videos if split in (None, w.split) and bool(w.excluded) == excluded]


def by_name(planned: PreparationPlan) -> dict[str, PlannedVideo]:
    return {wanted.name: wanted for wanted in planned.videos}


def test_a_downloaded_folder_follows_its_official_lists(tmp_path: Path) -> None:
    touch(tmp_path / "train" / f"{A}_000061_000071.mp4", tmp_path / "val" / f"{B}_006700_006710.mkv")
    touch(tmp_path / "val" / "not_listed0_000001_000011.mp4", tmp_path / "test" / f"{D}_000001_000011.mp4")
    lists = tmp_path / "annotations"
    write(lists / "train.csv", [HEADER, f"say (in game),{C},0,10,train,0"])  # incomplete, as Kinetics-600's is
    write(
        lists / "train.txt",
        [HEADER.removesuffix(",is_cc"), f"say (in game),{C},0,10,train", f'"quoted ""hi"", it\'s",{A},61,71,train'],
    )
    write(lists / "validate.csv", [HEADER, f"abseiling,{B},6700,6710.0,validate,1"])
    planned = plan_preparation(tmp_path)
    assert planned.classes == ["abseiling", 'quoted "hi", it\'s', "say (in game)"]
    rows = by_name(planned)
    assert list(rows) == [f"{C}_000000_000010.mp4", f"train/{A}_000061_000071.mp4", f"val/{B}_006700_006710.mkv"]
    found = rows[f"train/{A}_000061_000071.mp4"]
    assert found == PlannedVideo(
        split="train",
        position=1,
        name=f"train/{A}_000061_000071.mp4",
        label='quoted "hi", it\'s',
        source=str(tmp_path / "train" / f"{A}_000061_000071.mp4"),
        target=f'videos/train/quoted "hi", it\'s/{A}_000061_000071.mp4',
        group=A,
    )
    assert not Path(rows[f"{C}_000000_000010.mp4"].source).exists()  # has a row, although the file is missing
    # The test split was not listed, so its files are not strays.
    assert planned.extra == ["val/not_listed0_000001_000011.mp4"]
    assert planned.notes == [
        "1 videos in the source are on no list; extra.csv names them",
        "split train has no video of 1 of 3 classes: 'abseiling'",
    ]


def test_groups_given_beside_the_lists_take_precedence(tmp_path: Path) -> None:
    touch(*(tmp_path / "raw" / name for name in ("run/p1_a.mp4", "run/p2_a.mp4", "walk/v_Walk_g01_c01.mp4")))
    plan = plan_preparation(tmp_path / "raw", groups=GroupRule(regex=r"/(p\d)"))
    assert [video.group for video in plan.videos] == ["p1", "p2", "Walk_g01"]
    assert plan.notes == [r"--group-regex /(p\d): gives 1 videos no group, such as 'walk/v_Walk_g01_c01.mp4'"]
    listed = write(
        tmp_path / "groups.csv", ["path,group", f"{tmp_path}/raw/run/p1_a.mp4,x", "walk/v_Walk_g01_c01.mp4,y"]
    )
    plan = plan_preparation(tmp_path / "raw", groups=GroupRule(listed))
    assert [video.group for video in plan.videos] == ["x", "", "y"]


def test_columns_that_are_not_used_are_told_and_two_groups_refused(tmp_path: Path) -> None:
    listed = write(tmp_path / "list.csv", ["path,label,camera,fps", "a.mp4,run,7,25"])
    assert plan_preparation(listed).notes == [f"{listed}: columns that are not used: camera, fps"]
    write(listed, ["path,label,group", "a.mp4,run,g", "./a.mp4,run,h"])
    with pytest.raises(UsageError, match=r"line 3: 'a\.mp4' is also listed in .* with another label, group or segment"):
        plan_preparation(listed)


def test_segments_are_cut_from_whole_videos_unless_trimmed_ones_exist(tmp_path: Path) -> None:
    touch(*(tmp_path / "raw" / name for name in (f"{A}.mkv", f"deep/v_{B}.webm", f"{C}.mp4", f"{C}_000001_000011.mp4")))
    table = write(
        tmp_path / "val.csv",
        [HEADER, *(f"run,{i},1,11,val,0" for i in (A, B, C, D)), f"run,{A},20,30,val,0", f"run,{A},20.5,30.5,val,0"],
    )
    rows = by_name(plan_preparation(tmp_path / "raw", [table]))
    parts = {name: (Path(row.source).name, row.start, row.end) for name, row in rows.items()}
    assert parts == {
        f"{A}_000001_000011.mp4": (f"{A}.mkv", 1.0, 11.0),
        f"{B}_000001_000011.mp4": (f"v_{B}.webm", 1.0, 11.0),
        f"{C}_000001_000011.mp4": (f"{C}_000001_000011.mp4", None, None),
        f"{D}_000001_000011.mp4": (f"{D}_000001_000011.mp4", None, None),
        f"{A}_000020_000030.mp4": (f"{A}.mkv", 20.0, 30.0),
        f"{A}_000020.500_000030.500.mp4": (f"{A}.mkv", 20.5, 30.5),
    }
    assert len({row.target for row in rows.values()}) == 6
    assert {row.group for row in rows.values()} == {A, B, C, D}
    assert plan_preparation(tmp_path / "raw", [table]).notes[0] == "4 videos are segments to be cut from longer videos"
    assert plan_preparation(tmp_path / "raw", [table]).extra == [f"{C}.mp4"]


def test_versions_of_kinetics_are_mixed_without_leaks(tmp_path: Path) -> None:
    k400 = write(
        tmp_path / "k400.csv", [HEADER, f"run,{A},1,11,train,0", f"run,{B},1,11,train,0", f"run,{C},1,11,val,0"]
    )
    lines = [f"running,{C},50,60,train", f"running,{B},1,11,train", f"running,{B},5,15,train", f"swim,{C},1,11,val"]
    k600 = write(tmp_path / "k600.csv", [HEADER.removesuffix(",is_cc"), *lines])
    (tmp_path / "raw").mkdir()
    planned = plan_preparation(tmp_path / "raw", [k400, k600])
    assert planned.classes == ["run", "running", "swim"]
    assert names(planned, "train") == [f"{A}_000001_000011.mp4", f"{B}_000001_000011.mp4", f"{B}_000005_000015.mp4"]
    assert names(planned, "train", excluded=True) == [f"{C}_000050_000060.mp4", f"{B}_000001_000011.mp4 (2)"]
    assert names(planned, "val") == [f"{C}_000001_000011.mp4"]
    assert by_name(planned)[f"{C}_000001_000011.mp4"].label == "run"  # that of the first list
    assert {w.excluded for w in planned.videos} == {"", "duplicate"}
    assert [w.position for w in planned.videos] == [0, 1, 2, 3, 4, 0, 1]
    assert len({w.target for w in planned.videos}) == 7
    assert planned.notes == [
        "1 videos of train are excluded: an earlier list also has them",
        "1 videos of val are excluded: an earlier list also has them",
        "1 training videos are excluded: another split or a held-out list has their YouTube ids",
        "split train has no video of 1 of 3 classes: 'swim'",
    ]
    held = write(tmp_path / "held_out.csv", [HEADER, f"run,{A},300,310,train,0"])
    assert names(plan_preparation(tmp_path / "raw", [k400], held_out=[held]), "train") == [f"{B}_000001_000011.mp4"]
    with PreparationState(tmp_path, create=True) as state:  # which requires unique names and targets
        state.sync_with_plan(planned.videos)
        counts = state.counts_by_split()
    assert (counts["train"].excluded, counts["val"].excluded) == ({"duplicate": 2}, {"duplicate": 1})


def test_path_lists_of_kinetics_clips_leak_nothing_either(tmp_path: Path) -> None:
    train = write(tmp_path / "k400_train_list.txt", [f"a/{A}_000001_000011.mp4 0", f"a/{B}_000001_000011.mp4 1"])
    val = write(tmp_path / "k400_val_list.txt", [f"b/{B}_000050_000060.mp4 1"])
    planned = plan_preparation(tmp_path, [train, val])
    assert names(planned, "train", excluded=True) == [f"a/{B}_000001_000011.mp4"]
    assert names(planned, "val") == [f"b/{B}_000050_000060.mp4"]
    # The splits of a folder tree are taken as they are, unless a list is held out.
    for split, name in (("train", f"{B}_000001_000011"), ("val", f"{B}_000050_000060")):
        touch(tmp_path / "tree" / split / "run" / f"{name}.mp4")
    assert names(plan_preparation(tmp_path / "tree"), excluded=True) == []
    assert names(plan_preparation(tmp_path / "tree", held_out=[val]), excluded=True) == [
        f"train/run/{B}_000001_000011.mp4"
    ]


def test_official_kinetics_lists_mix_as_counted(outside_data: Path, tmp_path: Path) -> None:
    folder = outside_data / "kinetics"
    val400, val600 = folder / "kinetics-400_val.csv", folder / "kinetics-600_val.csv"
    as_train = tmp_path / "train.csv"
    as_train.write_text(val400.read_text().replace(",val,", ",train,"))
    (tmp_path / "raw").mkdir()
    counts = Counter((w.split, w.excluded) for w in plan_preparation(tmp_path / "raw", [as_train, val600]).videos)
    assert counts == {("train", ""): 19_906 - 13_569, ("train", "duplicate"): 13_569, ("val", ""): 30_000}
    planned = plan_preparation(tmp_path / "raw", [val400, val600, folder / "kinetics-400_test.csv"])
    assert len(planned.classes) == 632
    counts = Counter((w.split, w.excluded, bool(w.label)) for w in planned.videos)
    # 13,566 are the same ten seconds of the same video; three are other segments of the same video, which val may have.
    assert counts[("val", "duplicate", True)] == 13_566
    assert counts[("val", "", True)] == 19_906 + 30_000 - 13_566
    assert counts[("test", "", False)] == 38_685
    assert {w.target for w in planned.videos if w.split == "test"} >= {"videos/test/--6bJUbfpnQ_000017_000027.mp4"}


def test_repeated_lines_are_merged_and_contradictions_refused(tmp_path: Path) -> None:
    lines = [HEADER, f"run,{A},1,11,val,0", f"swim,{B},1,11,val,0", f"run,{A},1,11,val,0"]
    table = write(tmp_path / "k.csv", lines)
    planned = plan_preparation(tmp_path, [table])
    assert names(planned) == [f"{A}_000001_000011.mp4", f"{B}_000001_000011.mp4"]
    assert planned.notes == [f"{table}: 1 lines repeat an earlier one and were dropped"]
    write(table, [*lines, f"run,{B},1,11,val,0"])
    with pytest.raises(UsageError, match=rf"k\.csv, line 5: '{B}_.*' is also listed in .*line 3, with another label"):
        plan_preparation(tmp_path, [table])
    paths = write(tmp_path / "train.txt", ["a.mp4 0", "a.mp4 0", "b.mp4 1"])
    assert names(plan_preparation(tmp_path, [paths])) == ["a.mp4", "b.mp4"]
    with pytest.raises(UsageError, match=r"more\.txt, line 1: 'a\.mp4' is also listed in"):
        plan_preparation(tmp_path, [paths, write(tmp_path / "more.txt", ["a.mp4 1"])])


def test_ucf101_with_its_official_splits(tmp_path: Path) -> None:
    lists = tmp_path / "ucfTrainTestlist"
    write(lists / "classInd.txt", ["1 ApplyEyeMakeup", "10 Biking", "2 HandstandPushups"])
    write(
        lists / "trainlist02.txt", ["ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi 1", "Biking/v_Biking_g25_c07.avi 10"]
    )
    write(lists / "testlist02.txt", ["HandstandPushups/v_HandStandPushups_g01_c01.avi"])
    touch(tmp_path / "UCF-101" / "ApplyEyeMakeup" / "v_ApplyEyeMakeup_g08_c01.avi")
    touch(tmp_path / "UCF-101" / "HandstandPushups" / "v_HandstandPushups_g01_c01.avi")
    planned = plan_preparation(tmp_path, official_split=2)
    assert planned.classes == ["ApplyEyeMakeup", "HandstandPushups", "Biking"]  # by number, not by name
    assert [(w.split, w.name, w.label, w.group, Path(w.source).is_file()) for w in planned.videos] == [
        ("train", "UCF-101/ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi", "ApplyEyeMakeup", "ApplyEyeMakeup_g08", True),
        ("train", "Biking/v_Biking_g25_c07.avi", "Biking", "Biking_g25", False),
        (
            "test",
            "UCF-101/HandstandPushups/v_HandstandPushups_g01_c01.avi",
            "HandstandPushups",
            "HandstandPushups_g01",
            True,
        ),
    ]
    assert (
        plan_preparation(tmp_path / "UCF-101", [lists], official_split=2).videos[0].name == planned.videos[0].name[8:]
    )
    with pytest.raises(UsageError, match=r"trainlist01\.txt: cannot be read"):
        plan_preparation(tmp_path)
    with pytest.raises(UsageError, match=r"trainlist02\.txt: is one of several official lists"):
        plan_preparation(tmp_path, [lists / "trainlist02.txt"])


def test_hmdb51_with_its_official_splits(tmp_path: Path) -> None:
    lists, flat = tmp_path / "splits", tmp_path / "flat"
    film = "American_#1_History(X)_{}_u_nm_np1_ba_goo_{}.avi"
    for label in ("wave", "brush_hair"):
        write(lists / f"{label}_test_split1.txt", [f"{film.format(label, n)} {n} " for n in (0, 1, 2)])
        touch(*(tmp_path / label / film.format(label, n) for n in (0, 1, 2)))
        touch(*(flat / film.format(label, n) for n in (0, 1, 2)))
    touch(tmp_path / "wave" / "stray.avi")
    planned = plan_preparation(tmp_path / "flat", [lists])
    assert planned.classes == ["brush_hair", "wave"]
    assert names(planned, "train") == [film.format("brush_hair", 1), film.format("wave", 1)]
    assert names(planned, "test") == [film.format("brush_hair", 2), film.format("wave", 2)]
    assert {w.group for w in planned.videos} == {"American_#1_History(X)"}
    assert planned.extra == []  # number 0 is listed: it is in neither split
    for path in flat.iterdir():
        path.unlink()
    planned = plan_preparation(tmp_path)
    assert names(planned, "test") == [f"{label}/{film.format(label, 2)}" for label in ("brush_hair", "wave")]
    assert planned.extra == ["wave/stray.avi"]
    with pytest.raises(UsageError, match=r"no lists \*_test_split3\.txt"):
        plan_preparation(tmp_path, official_split=3)


@pytest.mark.parametrize("prefix", ["", "something-something-v2-"])
def test_something_something_with_its_templates(tmp_path: Path, prefix: str) -> None:
    lists, videos = tmp_path / "labels", tmp_path / "20bn-something-something-v2"

    def dump(word: str, content: object) -> None:
        lists.mkdir(exist_ok=True)
        (lists / f"{prefix}{word}.json").write_text(json.dumps(content))

    dump("labels", {"Holding something next to something": "1", "Attaching something to something": "0"})
    template = "Holding [something] next to [something]"
    dump("train", [{"id": "78687", "label": "holding potato", "template": template, "placeholders": ["a", "b"]}])
    dump("validation", [{"id": "5", "label": "x", "template": "Attaching [something] to [something]"}])
    dump("test", [{"id": "7"}])
    touch(*(videos / f"{number}.webm" for number in (78687, 5, 7)))
    planned = plan_preparation(tmp_path)
    assert planned.classes == ["Attaching something to something", "Holding something next to something"]
    assert [(w.split, Path(w.source).name, w.label) for w in planned.videos] == [
        ("train", "78687.webm", "Holding something next to something"),
        ("val", "5.webm", "Attaching something to something"),
        ("test", "7.webm", ""),
    ]
    write(lists / "test-answers.csv", ["7;Holding something next to something"])
    assert plan_preparation(videos, [lists]).videos[2].label == "Holding something next to something"
    dump("train", [{"id": "78687", "template": "Holding [something]"}])
    with pytest.raises(UsageError, match=r"train\.json, id 78687: label 'Holding something' is not one of the 2"):
        plan_preparation(tmp_path)


@pytest.mark.parametrize(
    ("stem", "label", "origin"),
    [
        ("-_a_000001_0_000010_000020", None, "-_a_000001_0"),
        ("v_HandStandPushups_g01_c04", None, "HandStandPushups_g01"),
        ("April_09_brush_hair_u_nm_np1_ba_goo_0", "brush_hair", "April_09"),
        ("set1_seq03_016", "pushing", ""),
    ],
)
def test_origins_recognised_by_name(stem: str, label: str | None, origin: str) -> None:
    assert origin_of(stem, label) == origin


def test_prepared_data_inside_the_source_is_ignored(tmp_path: Path) -> None:
    table = write(tmp_path / "val.csv", [HEADER, f"run,{A},1,11,val,0"])
    touch(tmp_path / "out" / "videos" / "val" / "run" / f"{A}_000001_000011.mp4", tmp_path / "out" / "prep.sqlite")
    planned = plan_preparation(table)
    assert names(planned) == [f"{A}_000001_000011.mp4"]
    assert planned.extra == []


def test_colliding_names_get_different_targets(tmp_path: Path) -> None:
    touch(*(tmp_path / name for name in ("a?/x.mp4", "a?/x.mkv", "a?/X.avi", "A?/x.mp4", "b\\c/ ..mp4")))
    targets = [w.target for w in plan_preparation(tmp_path).videos]
    assert len({target.casefold() for target in targets}) == 5
    assert all(target.count("/") == 3 and target.endswith(".mp4") for target in targets)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (f"run,{A},11,1,val,0", "line 2: needs a youtube_id and 0 <= time_start < time_end"),
        ("run,,1,11,val,0", "line 2: needs a youtube_id"),
        (f"run,{A},1,nan,val,0", "line 2: needs a youtube_id and 0"),
        (f"run,{A},1,eleven,val,0", "line 2: time_start and time_end must be seconds"),
        (f"run,{A},1,11,val,0,1", "line 2: too many fields"),
    ],
)
def test_invalid_lines_are_named(tmp_path: Path, line: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        plan_preparation(write(tmp_path / "val.csv", [HEADER, line]))


def test_what_cannot_be_a_source(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no videos found"):
        plan_preparation(tmp_path)
    with pytest.raises(UsageError, match="no such data set"):
        plan_preparation(tmp_path, [tmp_path / "nowhere.csv"])
    touch(tmp_path / "run" / "a.mp4")
    with pytest.raises(UsageError, match="contains no YouTube ids"):
        plan_preparation(tmp_path, held_out=[write(tmp_path / "held.txt", ["a.mp4 0"])])
    with pytest.raises(UsageError, match="holds no list train, val or test"):
        plan_preparation(tmp_path, [tmp_path / "run"])


def kinetics_sized(path: Path, count: int) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(HEADER.split(","))
        writer.writerows([f"class {n % 400}", f"{n:011d}", n % 600, n % 600 + 10, "train", 0] for n in range(count))
    return path


def test_planning_is_cheap_per_video(tmp_path: Path) -> None:
    count = 20_000
    kinetics_sized(tmp_path / "train.csv", count)
    touch(*(tmp_path / "train" / f"{n:011d}_{n % 600:06d}_{n % 600 + 10:06d}.mp4" for n in range(500)))
    started = time.process_time()
    planned = plan_preparation(tmp_path)
    seconds = time.process_time() - started
    assert len(planned.videos) == count
    assert sum(w.name.startswith("train/") for w in planned.videos) == 500
    assert seconds / count < 20.0 / 246_534


@pytest.mark.slow
def test_the_whole_of_kinetics_is_planned_in_seconds_and_megabytes(tmp_path: Path) -> None:
    table = kinetics_sized(tmp_path / "train.csv", 246_534)
    # The peak of this process alone: getrusage would also include that of the process that started it.
    code = (
        "import re, sys, time; from pathlib import Path; from data_prep.sources import plan_preparation\n"
        "planned = plan_preparation(Path(sys.argv[1])); assert len(planned.videos) == 246534\n"
        "print(time.process_time(), int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]) / 1024)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(table)], cwd=REPOSITORY, capture_output=True, text=True)
    seconds, mebibytes = map(float, done.stdout.split())
    assert seconds < 15
    assert mebibytes < 400
