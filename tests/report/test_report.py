"""The report page: parsed, compared with the figures, and attacked with names that contain markup."""

from __future__ import annotations

import base64
import json
import re
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.report.report_pages import ATTACK, Page, make_folder, make_run, make_six, matrix_of, metrics_of, write_page
from video_swinv2.errors import UsageError, UserError
from video_swinv2.report.confusion import confused_order, matrix_data
from video_swinv2.report.metrics import ClassAccuracy, video_probabilities
from video_swinv2.report.mistakes import MAX_MISTAKES, film_strip, jpeg_uri, surest_mistakes
from video_swinv2.report.page import split_classes, write_report
from video_swinv2.report.scores import Scores, save_scores
from video_swinv2.report.training_run import find_training_run, flatten


def counts(confusion: np.ndarray, classes: tuple[str, ...]) -> list[tuple[str, str, int]]:
    """(label, answer, count) of every non-zero cell."""
    places = [(i, j) for i in range(len(classes)) for j in range(len(classes)) if confusion[i, j]]
    return [(classes[i], classes[j], int(confusion[i, j])) for i, j in places]


@pytest.fixture
def six(tmp_path: Path) -> tuple[Path, Scores]:
    return make_six(tmp_path)


def test_page_shows_the_figures(six: tuple[Path, Scores]) -> None:
    out, scores = six
    raw = write_page(out)
    page = Page(raw)
    metrics = metrics_of(scores)
    text = page.text
    assert f"{100 * metrics.top1:.1f} % top-1" in text
    assert page.texts[0] == f'<b>/model.safetensors on a "quoted" folder (test): {100 * metrics.top1:.1f} % top-1'
    assert f"chance, {100 * metrics.chance:.1f} %. Always answering {metrics.majority[0]}" in text
    assert f"{100 * metrics.top1_interval[0]:.1f} to {100 * metrics.top1_interval[1]:.1f}" in text
    bounds = f"{100 * metrics.top1_bounds[0]:.1f} to {100 * metrics.top1_bounds[1]:.1f} %"
    assert f"top-1 over all listed videos: {bounds}" in text
    assert "ab" * 32 in text
    assert "videoswin-4x3" in text
    data = matrix_of(raw)
    cells = data["cells"]
    drawn = [
        (data["classes"][i], data["classes"][j], n)
        for i, j, n in zip(cells[::3], cells[1::3], cells[2::3], strict=True)
    ]
    assert drawn == counts(metrics.confusion, scores.classes)
    for row in metrics.per_class:
        assert row.name in page.texts
    for mistake in surest_mistakes(scores, video_probabilities(scores)):
        assert f"{mistake.path} · view {mistake.view + 1} from frame {mistake.start}" in text
    assert text.count(f"reason {ATTACK}") == 2


def test_two_classes_of_few_sources(tmp_path: Path) -> None:
    """No top-5, the figures of two classes, and a warning: in the page and in the text."""
    origins = [f"recording {i % 12}" for i in range(60)]
    scores = make_folder(tmp_path, ("calm", "fight"), 60, failed=0, origins=origins, date="2026-01-02 03:04 UTC")
    page = Page(write_page(tmp_path))
    two = metrics_of(scores).two_classes
    assert two is not None
    said = (tmp_path / "report.md").read_text()
    result = json.loads((tmp_path / "results.json").read_text())
    assert page.texts[0].endswith("(test), 2026-01-02 03:04 UTC: " + f"{100 * result['top1']:.1f} % top-1")
    assert "top-5" not in page.text + said
    assert result["top5"] is None
    assert f"ROC AUC {two.roc_auc:.3f}" in page.text
    assert f"ROC AUC {two.roc_auc:.4f}" in said
    for row in two.classes:
        shown = f"{row.name} {100 * row.precision:.1f} % {100 * row.recall:.1f} % {100 * row.f1:.1f} % {row.pr_auc:.3f}"
        assert shown in page.text
        assert f"precision {100 * row.precision:.2f} %, recall {100 * row.recall:.2f} %" in said
    for text in (page.text, said):
        assert "arning: the videos come from only 12 independent sources" in text
        assert "most frequent class" in text
    make_folder(tmp_path, ("calm", "fight"), 60, failed=0)
    assert "independent source" not in Page(write_page(tmp_path)).text.replace("independent sources unknown", "")


def test_nothing_in_a_name_can_run_or_break_out(six: tuple[Path, Scores]) -> None:
    out, _ = six
    raw = write_page(out)
    assert ATTACK not in raw
    page = Page(raw)
    scripts = [attributes for tag, attributes in page.tags if tag == "script"]
    assert scripts == [{"type": "application/json", "id": "matrix-data"}, {}]
    assert "'unsafe-inline'" not in raw.split("script-src")[1].split('"')[0], (
        "only the script with the known digest may run"
    )
    assert "sha256-" in raw.split("script-src")[1].split('"')[0]
    assert ATTACK in page.texts, "shown as text"
    known = {"class", "style", "title", "src", "alt", "id", "role", "x", "y", "width", "height", "fill-opacity"}
    known |= {"lang", "charset", "name", "content", "http-equiv", "aria-label", "aria-live", "viewbox", "transform"}
    known |= {"type", "for", "list", "placeholder", "size", "value", "selected", "open", "preserveaspectratio"}
    known |= {"points", "d", "x1", "x2", "y1", "y2"}
    for tag, attributes in page.tags:
        assert set(attributes) <= known, f"a name broke out of an attribute of {tag}"
    assert any(attributes.get("title") == ATTACK for _, attributes in page.tags)


def test_page_loads_nothing(six: tuple[Path, Scores]) -> None:
    out, scores = six
    raw = write_page(out)
    page = Page(raw)
    images = [attributes["src"] or "" for tag, attributes in page.tags if tag == "img"]
    assert len(images) == 2 * len(surest_mistakes(scores, video_probabilities(scores))) - 1 > 10
    for image in images:
        head, _, data = image.partition(",")
        assert head == "data:image/jpeg;base64"
        assert base64.b64decode(data).startswith(b"\xff\xd8\xff")
    without_script = raw[: raw.rindex("<script>")]
    assert "//" not in re.sub(r"(base64,|sha256-)[A-Za-z0-9+/=]+", "", without_script), "no address of any kind"
    assert not re.search(r"fetch|XMLHttp|import|src|https?:", raw[raw.rindex("<script>") :])
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "object", "base")
        assert "href" not in attributes


def test_report_is_rebuilt_from_the_scores_alone(six: tuple[Path, Scores]) -> None:
    out, _ = six
    result = write_report(out)
    first = {name: (out / name).read_bytes() for name in ("report.html", "report.md", "results.json")}
    assert json.loads(first["results.json"]) == result
    assert write_report(out) == result
    assert {name: (out / name).read_bytes() for name in first} == first
    (out / "strips.npz").unlink()
    page = Page(write_page(out))
    assert not [tag for tag, _ in page.tags if tag == "img"]
    with pytest.raises(UserError, match=r"nothing.*no such file"):
        write_report(out / "nothing")


@pytest.mark.parametrize("n_classes", [2, 13, 40, 400])
def test_any_number_of_classes(n_classes: int, tmp_path: Path) -> None:
    names = tuple(f"class number {i} with a rather long name" for i in range(n_classes))
    scores = make_folder(tmp_path, names, 5 * n_classes, failed=0, frame_order="shuffled")
    raw = write_page(tmp_path)
    page = Page(raw)
    assert len(raw) < 3e6
    assert "Frame order: shuffled" in page.text
    bars = [attributes["title"] for tag, attributes in page.tags if tag == "span" and attributes.get("class") == "name"]
    assert set(bars) == set(names)
    data = matrix_of(raw)
    assert sum(data["cells"][2::3]) == 5 * n_classes
    assert len(data["cells"]) == 3 * (metrics_of(scores).confusion > 0).sum()
    assert sorted(data["together"]) == list(range(n_classes))


def test_matrix_puts_confused_classes_side_by_side() -> None:
    confusion = np.diag([9, 9, 9, 9, 9, 9])
    confusion[0, 4] = confusion[3, 1] = 6
    order = confused_order(confusion)
    assert abs(order.index(0) - order.index(4)) == 1
    assert abs(order.index(1) - order.index(3)) == 1
    assert sorted(order) == list(range(6))
    assert confused_order(np.array([[1, 2], [0, 0]])) == [0, 1]
    data = matrix_data(np.array([[3, 1, 0], [0, 0, 0], [0, 2, 2]]), ("a", "b", "c"), "videos")
    assert data["cells"] == [0, 0, 3, 0, 1, 1, 2, 1, 2, 2, 2, 2]
    json.dumps(data)


def test_the_training_run_is_shown_if_found(tmp_path: Path) -> None:
    make_run(tmp_path / "run", note=ATTACK)
    runs = [{"name": f"seed-{i}", "best": best, "best_step": 9, "last": best} for i, best in enumerate((0.6, 0.7))]
    (tmp_path / "series.json").write_text(json.dumps({"metric": "val/top1", "runs": runs}))
    scores = make_folder(
        tmp_path / "test", ("a", "b", "c"), 40, model={"path": str(tmp_path / "run" / "m.safetensors")}
    )
    raw = write_page(tmp_path / "test")
    page = Page(raw)
    for words in (
        "Loss",
        "Validation accuracy",
        "Learning rate",
        "30 min 0 s, 4 h 0 min of device time",
        "8 x cuda",
        "28 M",
    ):
        assert words in page.text
    assert ATTACK not in raw
    assert ATTACK in page.texts
    assert json.loads((tmp_path / "test" / "results.json").read_text())["run"]["hours"] == 0.5
    run = find_training_run(tmp_path / "run")
    assert run is not None
    steps, losses = run.series("train/loss")
    assert len(steps) == 240
    assert losses[0] == pytest.approx(np.mean([3.0, 1.5, 1.0, 0.75, 0.6]))
    assert run.series("val/top1")[0].tolist() == [250, 500, 1000]
    make_folder(tmp_path / "test", scores.classes, 40)
    assert "Learning rate" not in Page(write_page(tmp_path / "test")).text
    write_report(tmp_path / "test", tmp_path / "run")
    assert "Learning rate" in (tmp_path / "test" / "report.html").read_text()
    with pytest.raises(UsageError, match=r"test: not a training run: no readable run\.json"):
        write_report(tmp_path / "test", tmp_path / "test")


def test_a_test_on_the_training_data_is_marked(tmp_path: Path) -> None:
    make_run(tmp_path / "run", data={"data_fingerprint": "ab" * 32})
    make_folder(tmp_path / "test", ("a", "b"), 20, model={"path": str(tmp_path / "run" / "m.safetensors")})
    assert "was trained on these same videos" in Page(write_page(tmp_path / "test")).text


def test_classes_out_of_order_are_pointed_out(tmp_path: Path) -> None:
    scores = make_folder(tmp_path, tuple("fedcba"), 200, failed=0)
    assert "in the wrong order" not in Page(write_page(tmp_path)).text
    save_scores(replace(scores, logits=scores.logits[:, :, ::-1].copy()), tmp_path / "scores.npz")
    text = Page(write_page(tmp_path)).text
    assert "The classes seem to be in the wrong order" in text
    assert "in alphabetical order" in text
    assert "class order looks wrong" in (tmp_path / "report.md").read_text()
    hint = json.loads((tmp_path / "results.json").read_text())["class_order_hint"]
    assert {(row["label"], row["answer"]) for row in hint["moved"]} == set(zip("fedcba", "abcdef", strict=True))


def test_surest_mistakes(tmp_path: Path) -> None:
    scores = make_folder(tmp_path, tuple("abcdef"), 80)
    probabilities = video_probabilities(scores)
    positions = np.flatnonzero(scores.scored)
    wrong = []
    for row, position in zip(probabilities, positions, strict=True):
        if row.argmax() != scores.labels[position]:
            wrong.append((float(row.max()), int(position)))
    wrong.sort(reverse=True)
    found = surest_mistakes(scores, probabilities)
    assert [(mistake.answer_probability, mistake.position) for mistake in found] == wrong[:12]
    for mistake in found:
        views = scores.logits[mistake.position].astype(float)
        shares = np.exp(views) / np.exp(views).sum(axis=1, keepdims=True)
        answer = scores.classes.index(mistake.answer)
        assert shares[mistake.view, answer] == shares[:, answer].max()
        assert mistake.label == scores.classes[scores.labels[mistake.position]] != mistake.answer
        assert mistake.guesses[0].name == mistake.answer
        assert [guess.name for guess in mistake.guesses if guess.right] == [mistake.label]
        assert len(mistake.guesses) in (5, 6)


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


@pytest.mark.parametrize(
    ("size", "shown"), [((16, 768, 384), (160, 80)), ((2, 160, 640), (80, 320)), ((900, 450), (320, 160))]
)
def test_strips_of_large_frames_are_small(size: tuple[int, ...], shown: tuple[int, int]) -> None:
    strip = film_strip(torch.zeros((3, *size), dtype=torch.uint8))
    rows, columns = {16: (2, 4), 2: (1, 2), 900: (1, 1)}[size[0]]
    height, width = Image.open(BytesIO(strip)).size[::-1]
    gap = 2 if rows * columns > 1 else 0
    assert (height, width) == (rows * (shown[0] + gap) + gap, columns * (shown[1] + gap) + gap)


def test_a_page_of_strips_is_bounded() -> None:
    """Noise of the largest size at which frames are not shrunk, the worst case of JPEG, twice for each mistake."""
    noise = film_strip(torch.randint(0, 256, (3, 8, 160, 160), dtype=torch.uint8))
    assert 2 * MAX_MISTAKES * len(jpeg_uri(noise)) < 5e6
    assert len(film_strip(torch.randint(0, 256, (3, 320, 320), dtype=torch.uint8))) < len(noise)


def test_flatten() -> None:
    assert list(flatten({"a": {"b": {"c": 1}}, "d": [1, 2], "e": "x", "f": {}})) == [
        ("a.b.c", "1"), ("d", "[1, 2]"), ("e", "x"), ("f", "{}")
    ]  # fmt: skip


def test_a_file_name_that_is_not_utf8_does_not_stop_the_report(tmp_path: Path) -> None:
    scores = make_folder(tmp_path, ("a", "b"), 10, failed=0)
    save_scores(replace(scores, paths=("\udcff.mp4", *scores.paths[1:])), tmp_path / "scores.npz")
    write_report(tmp_path)
    for name in ("report.html", "report.md", "results.json"):
        assert (tmp_path / name).stat().st_size > 500
