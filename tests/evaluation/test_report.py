"""The report page: parsed, compared with the figures, attacked with names, opened in a browser where there is one."""

from __future__ import annotations

import base64
import re
import shutil
import subprocess
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from video_swinv2.errors import UserError
from video_swinv2.evaluation.matrix import draw_matrix
from video_swinv2.evaluation.metrics import ClassAccuracy, compute_metrics, video_probabilities
from video_swinv2.evaluation.report import film_strip, flatten, split_classes, surest_mistakes, write_report
from video_swinv2.evaluation.scores import Scores, save_scores, write_arrays

ATTACK = "<script>alert(1)</script>"
VOID = {"meta", "link", "br", "img", "input", "rect"}
RECORD = {
    "protocol": "videoswin-4x3",
    "average": "prob",
    "views": 3,
    "frames": 8,
    "frame_stride": 4,
    "image_size": [64, 64],
    "frame_order": "in-order",
    "split": "test",
    "data": 'a "quoted" folder',
    "data_fingerprint": "ab" * 32,
    "model": {"path": "runs/<b>/model.safetensors"},
    "seed": 0,
}


class Page(HTMLParser):
    """Collects tags, attributes and text, and checks that tags nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == [], f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip() and self.open[-1] not in ("style", "script"):
            self.texts.append(data.strip())

    @property
    def text(self) -> str:
        return " ".join(self.texts)


def make_folder(out: Path, classes: tuple[str, ...], n: int, failed: int = 2, **record: object) -> Scores:
    rng = np.random.default_rng(len(classes))
    labels = rng.integers(0, len(classes), n)
    logits = rng.normal(size=(n, 3, len(classes)))
    right = rng.random(n) < 0.6
    logits[np.arange(n), :, np.where(right, labels, (labels + 1) % len(classes))] += 4
    logits[:failed] = np.nan
    views = np.zeros((n, 3, 5), np.int32)
    views[:failed] = -1
    scores = Scores(
        tuple(f'dir/it\'s "{i}" & {ATTACK}.mp4' for i in range(n)),
        labels,
        logits.astype(np.float16),
        views,
        tuple(f"reason {ATTACK}" if i < failed else "" for i in range(n)),
        classes,
        RECORD | record,
    )
    out.mkdir(exist_ok=True)
    save_scores(scores, out / "scores.npz")
    return scores


def counts(confusion: np.ndarray, classes: tuple[str, ...]) -> list[tuple[str, str, int]]:
    """(label, answer, count) of all cells above zero."""
    places = [(i, j) for i in range(len(classes)) for j in range(len(classes)) if confusion[i, j]]
    return [(classes[i], classes[j], int(confusion[i, j])) for i, j in places]


@pytest.fixture
def six(tmp_path: Path) -> tuple[Path, Scores]:
    scores = make_folder(tmp_path, (ATTACK, "b \"quoted\" 'name'", "c", "d & e", "f", "g"), 90)
    strips = {}
    mistakes = surest_mistakes(scores)
    for i in range(len(mistakes)):
        strips[f"jpeg_{i:03d}"] = np.frombuffer(film_strip(torch.full((3, 8, 16, 16), i, dtype=torch.uint8)), np.uint8)
    write_arrays(tmp_path / "strips.npz", strips | {"positions": np.array([mistake.position for mistake in mistakes])})
    return tmp_path, scores


def test_page_says_what_the_figures_are(six: tuple[Path, Scores]) -> None:
    out, scores = six
    page = Page(write_report(out).read_text(encoding="utf-8"))
    metrics = compute_metrics(scores)
    text = page.text
    assert f"{100 * metrics.top1:.1f} % top-1" in text
    assert f"{100 * metrics.top1_interval[0]:.1f} to {100 * metrics.top1_interval[1]:.1f}" in text
    assert f"{100 * metrics.top1_bounds[0]:.1f} to {100 * metrics.top1_bounds[1]:.1f} % of all listed" in text
    assert "ab" * 32 in text
    assert "videoswin-4x3" in text
    cells = {f"{row} → {column}: {count}" for row, column, count in counts(metrics.confusion, scores.classes)}
    assert {data.rsplit(" (", 1)[0] for data in page.texts if " → " in data} == cells
    for row in metrics.per_class:
        assert row.name in page.texts
    for mistake in surest_mistakes(scores):
        assert f"{mistake.path} · view {mistake.view + 1} from frame {mistake.start}" in text
    assert text.count(f"reason {ATTACK}") == 2


def test_nothing_in_a_name_can_run_or_break_out(six: tuple[Path, Scores]) -> None:
    out, _ = six
    raw = write_report(out).read_text(encoding="utf-8")
    assert ATTACK not in raw
    page = Page(raw)
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert ATTACK in page.texts, "shown as text"
    known = {"class", "style", "title", "src", "alt", "id", "role", "x", "y", "width", "height", "fill-opacity"}
    known |= {"lang", "charset", "name", "content", "http-equiv", "aria-label", "aria-live", "viewbox", "transform"}
    known |= {"text-anchor", "type", "for"}
    for tag, attributes in page.tags:
        assert set(attributes) <= known, f"a name broke out of an attribute of {tag}"
    assert any(attributes.get("title") == ATTACK for _, attributes in page.tags)


def test_page_needs_nothing_else(six: tuple[Path, Scores]) -> None:
    out, scores = six
    raw = write_report(out).read_text(encoding="utf-8")
    page = Page(raw)
    images = [attributes["src"] or "" for tag, attributes in page.tags if tag == "img"]
    assert len(images) == len(surest_mistakes(scores)) > 5
    for image in images:
        head, _, data = image.partition(",")
        assert head == "data:image/jpeg;base64"
        assert base64.b64decode(data).startswith(b"\xff\xd8\xff")
    assert "//" not in re.sub(r"base64,[A-Za-z0-9+/=]+", "", raw), "no address of any kind"
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "object", "base")
        assert "href" not in attributes


def test_page_is_made_again_from_the_scores_alone(six: tuple[Path, Scores]) -> None:
    out, _ = six
    first = write_report(out).read_bytes()
    assert write_report(out).read_bytes() == first
    (out / "strips.npz").unlink()
    page = Page(write_report(out).read_text(encoding="utf-8"))
    assert not [tag for tag, _ in page.tags if tag == "img"]
    with pytest.raises(UserError, match=r"nothing.*no such file"):
        write_report(out / "nothing")


@pytest.mark.parametrize("n_classes", [2, 13, 40, 400])
def test_any_number_of_classes(n_classes: int, tmp_path: Path) -> None:
    names = tuple(f"class number {i} with a rather long name" for i in range(n_classes))
    scores = make_folder(tmp_path, names, 20 * n_classes, failed=0, frame_order="shuffled")
    path = write_report(tmp_path)
    page = Page(path.read_text(encoding="utf-8"))
    assert path.stat().st_size < 8e6
    assert "Frames were shuffled" in page.text
    shown = [attributes["title"] for _, attributes in page.tags if "title" in attributes]
    assert sorted(name for name in shown if name) == sorted(names), "every class has its bar, once"
    confusion = compute_metrics(scores).confusion
    drawn = [attributes for tag, attributes in page.tags if tag == "rect" and "fill-opacity" in attributes]
    assert len(drawn) == (confusion > 0).sum()


def test_matrix_cells_are_where_they_belong() -> None:
    confusion = np.array([[3, 1, 0], [0, 0, 0], [0, 2, 2]])
    matrix = draw_matrix(confusion, ("a", "b", "x" * 60))
    assert [(cell.label[0], cell.answer[0], cell.count) for cell in matrix.cells] == [
        ("a", "a", 3), ("a", "b", 1), ("x", "b", 2), ("x", "x", 2)
    ]  # fmt: skip
    step = matrix.cell
    assert [(cell.x, cell.y) for cell in matrix.cells] == [(0, 0), (step, 0), (step, 2 * step), (2 * step, 2 * step)]
    assert [cell.right for cell in matrix.cells] == [True, False, False, True]
    assert [cell.share for cell in matrix.cells] == [0.75, 0.25, 0.5, 0.5]
    assert matrix.side == 3 * step
    assert len(matrix.names[2].text) < 60
    assert matrix.names[2].full == "x" * 60
    assert draw_matrix(np.eye(400, dtype=int), ("k",) * 400).side <= 900


def test_surest_mistakes(tmp_path: Path) -> None:
    scores = make_folder(tmp_path, tuple("abcdef"), 80)
    probabilities = video_probabilities(scores)
    positions = np.flatnonzero(scores.scored)
    wrong = []
    for row, position in zip(probabilities, positions, strict=True):
        if row.argmax() != scores.labels[position]:
            wrong.append((float(row.max()), int(position)))
    wrong.sort(reverse=True)
    found = surest_mistakes(scores)
    assert [(mistake.answer_probability, mistake.position) for mistake in found] == wrong[:12]
    for mistake in found:
        views = scores.logits[mistake.position].astype(float)
        shares = np.exp(views) / np.exp(views).sum(axis=1, keepdims=True)
        answer = scores.classes.index(mistake.answer)
        assert shares[mistake.view, answer] == shares[:, answer].max()
        assert mistake.label == scores.classes[scores.labels[mistake.position]] != mistake.answer


def test_classes_worst_first() -> None:
    rows = (*(ClassAccuracy(str(i), 5, i / 100) for i in range(99, 0, -1)), ClassAccuracy("none", 0, None))
    shown, rest = split_classes(rows)
    assert [row.name for row in shown] == [str(i) for i in range(1, 21)]
    assert len(rest) == 80
    assert rest[-1].name == "none"
    assert split_classes(rows[:30])[1] == []


def test_film_strip_is_a_picture_of_the_frames() -> None:
    clip = torch.arange(16, dtype=torch.uint8)[None, :, None, None].expand(3, 16, 32, 48) * 15
    picture = np.asarray(Image.open(BytesIO(film_strip(clip)))).astype(int)
    assert picture.shape == (2 * 34 + 2, 4 * 50 + 2, 3)
    centres = [picture[18 + 34 * row, 26 + 50 * column, 0] for row in range(2) for column in range(4)]
    np.testing.assert_allclose(centres, np.round(np.linspace(0, 15, 8)) * 15, atol=4)
    assert film_strip(clip[:, 0])[:3] == b"\xff\xd8\xff"


def test_record_is_flat() -> None:
    assert list(flatten({"a": {"b": {"c": 1}}, "d": [1, 2], "e": "x", "f": {}})) == [
        ("a.b.c", "1"), ("d", "[1, 2]"), ("e", "x"), ("f", "{}")
    ]  # fmt: skip


def test_a_name_that_is_no_text_does_not_stop_the_page(tmp_path: Path) -> None:
    scores = make_folder(tmp_path, ("a", "b"), 10, failed=0)
    odd = Scores(("\udcff.mp4", *scores.paths[1:]), scores.labels, scores.logits, scores.views, scores.reasons,
                 scores.classes, scores.metadata)  # fmt: skip
    save_scores(odd, tmp_path / "scores.npz")
    assert write_report(tmp_path).stat().st_size > 1000


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium here")
@pytest.mark.parametrize("window", ["1200,900", "390,800"])
def test_a_browser_has_nothing_to_complain_of(six: tuple[Path, Scores], window: str, tmp_path: Path) -> None:
    out, _ = six
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"]
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    page = f"file://{write_report(out)}"
    done = subprocess.run(
        [*command, profile, f"--window-size={window}", page], capture_output=True, text=True, timeout=60, check=True
    )
    assert ":CONSOLE" not in done.stderr, done.stderr
    assert "Record of this test" in done.stdout
    assert "alert(1)&lt;/script" in done.stdout
