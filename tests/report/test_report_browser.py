"""The report in headless Chromium, if installed: no console errors, no requests, a working matrix, a printout."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from tests.report.report_pages import RECORD, Page, build_scores, make_folder, make_six, metrics_of, write_page
from video_swinv2.report.compare import compare
from video_swinv2.report.page import write_report
from video_swinv2.report.scores import Scores, save_scores

pytestmark = pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")


@pytest.fixture
def six(tmp_path: Path) -> tuple[Path, Scores]:
    return make_six(tmp_path)


def chromium(page: Path, profile: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    command += ["--disable-background-networking", "--virtual-time-budget=20000", f"--user-data-dir={profile}"]
    return subprocess.run(
        [*command, *options, f"file://{page}"], capture_output=True, text=True, timeout=600, check=True
    )


PROBE = """
<script>
const say = (id, text) => {
  const line = document.createElement("p");
  line.id = id;
  line.textContent = text;
  document.body.append(line);
};
const at = (row, column) => {
  const box = canvas.getBoundingClientRect(), { margin, head, cell } = layout;
  const clientX = box.left + margin + (column + 0.5) * cell, clientY = box.top + head + (row + 0.5) * cell;
  return { clientX, clientY, bubbles: true };
};
const aim = (row, column) => {
  canvas.dispatchEvent(new PointerEvent("pointermove", at(row, column)));
  return readout.textContent;
};
const probe = () => {
  if (!layout) {  // the first frame has not been drawn yet
    setTimeout(probe, 20);
    return;
  }
  say("first", aim(0, 1));
  canvas.dispatchEvent(new MouseEvent("click", at(0, 1)));
  say("picked-said", picked.textContent);
  const choice = document.getElementById("order");
  choice.value = "worst";
  choice.dispatchEvent(new Event("change"));
  say("worst", aim(0, 0));
  document.getElementById("closer").click();
  say("span", String(span));
  say("ink", String(new Set(pen.getImageData(0, 0, canvas.width, canvas.height).data).size));
};
addEventListener("load", probe);
</script>
"""


def test_the_matrix_reacts_to_pointing_sorting_and_zooming(tmp_path: Path) -> None:
    names = tuple(f"<b>{i:02d}</b>" for i in range(30))
    scores = make_folder(tmp_path, names, 900, failed=0)
    confusion = metrics_of(scores).confusion
    raw = re.sub(r"<meta http-equiv[^>]*>", "", write_page(tmp_path)) + PROBE  # its policy would block the probe
    (tmp_path / "probe.html").write_text(raw)
    dom = chromium(tmp_path / "probe.html", tmp_path / "profile", "--window-size=1200,900", "--dump-dom").stdout
    page = Page(dom[dom.index("<html") :])
    said = {attributes.get("id"): i for i, (_, attributes) in enumerate(page.tags) if attributes.get("id")}
    assert {"first", "picked-said", "worst", "span", "ink"} <= set(said)
    total, count = confusion[0].sum(), confusion[0, 1]
    assert f"{names[0]}, answered {names[1]}: {count} of {total} ({100 * count / total:.1f} %)" in page.texts
    worst = int(np.argmin(np.diag(confusion) / confusion.sum(axis=1)))
    total, count = confusion[worst].sum(), confusion[worst, worst]
    assert f"{names[worst]}, answered correctly: {count} of {total} ({100 * count / total:.1f} %)" in page.texts
    assert "15" in page.texts, "zoomed in"
    assert any(text.startswith(f"Answers for {names[0]}: ") for text in page.texts)
    assert max(int(text) for text in page.texts if text.isdecimal()) > 50, "something was drawn"


@pytest.mark.parametrize("window", ["1200,900", "390,800"])
def test_the_browser_logs_no_error(six: tuple[Path, Scores], window: str, tmp_path: Path) -> None:
    out, _ = six
    write_report(out)
    done = chromium(out / "report.html", tmp_path / "profile", f"--window-size={window}", "--dump-dom")
    assert ":CONSOLE" not in done.stderr, done.stderr
    assert "Record of this test" in done.stdout
    assert "alert(1)&lt;/script" in done.stdout


def test_the_page_makes_no_request(six: tuple[Path, Scores], tmp_path: Path) -> None:
    out, _ = six
    raw = write_page(out)
    assert not requests_of_page(out / "report.html", tmp_path)
    # Without its policy and with a remote image the same page does make one: the check above can fail.
    (out / "leak.html").write_text(re.sub(r"<meta http-equiv[^>]*>", "", raw) + '<img src="http://127.0.0.1:9/x.png">')
    assert requests_of_page(out / "leak.html", tmp_path)


WIDTHS = """
<script>
addEventListener("load", () => {
  const wide = [document.documentElement, ...document.querySelectorAll(".scrolling")];
  const line = document.createElement("p");
  line.id = "hidden";
  line.textContent = `${wide.length} looked at, hidden: ${wide.map((one) => one.scrollWidth - one.clientWidth)}`;
  document.body.append(line);
});
</script>
"""


def test_no_column_of_a_comparison_is_off_the_screen_of_a_phone(tmp_path: Path) -> None:
    """500 px is the narrowest window that Chromium opens; it gets the layout of a phone."""
    folders = [tmp_path / name for name in "ab"]
    for folder in folders:
        make_folder(folder, ("a class with a long name", "b", "c", "d", "e", "f"), 60, failed=0)
    compare(folders, tmp_path / "out")
    raw = re.sub(r"<meta http-equiv[^>]*>", "", (tmp_path / "out" / "comparison.html").read_text()) + WIDTHS
    (tmp_path / "probe.html").write_text(raw)
    dom = chromium(tmp_path / "probe.html", tmp_path / "profile", "--window-size=500,900", "--dump-dom").stdout
    hidden = re.search(r"(\d+) looked at, hidden: ([-\d,]+)", dom[dom.rindex("<p id=") :])
    assert hidden, dom[-300:]
    assert int(hidden[1]) >= 3
    assert set(hidden[2].split(",")) == {"0"}


@pytest.mark.parametrize("window", ["1200,900", "500,900"])
def test_ten_clips_fit_beside_their_plot_and_on_a_phone(window: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 40)
    logits = rng.normal(size=(40, 30, 2)) + np.eye(2)[labels][:, None]
    numbers = {"protocol": "slowfast-10x3", "views": 30, "protocol_numbers": {"clips": 10, "crops": 3}}
    save_scores(build_scores(labels, logits, **RECORD | numbers), tmp_path / "scores.npz")
    raw = re.sub(r"<meta http-equiv[^>]*>", "", write_page(tmp_path)) + WIDTHS
    assert "10 clips" in raw
    (tmp_path / "probe.html").write_text(raw)
    dom = chromium(tmp_path / "probe.html", tmp_path / "profile", f"--window-size={window}", "--dump-dom").stdout
    assert "2 looked at, hidden: 0,0<" in dom[dom.rindex("<p id=") :], dom[-200:]


def requests_of_page(page: Path, folder: Path) -> list[str]:
    """The initiators of network requests, except the browser itself, which looks for updates."""
    log = folder / "net.json"
    chromium(page, folder / "profile", f"--log-net-log={log}", "--dump-dom")
    initiators = re.findall(r'"initiator":"([^"]*)"', log.read_text(errors="replace"))
    return [initiator for initiator in initiators if initiator != "not an origin"]


def test_the_page_prints(six: tuple[Path, Scores], tmp_path: Path) -> None:
    out, _ = six
    write_report(out)
    done = chromium(out / "report.html", tmp_path / "profile", f"--print-to-pdf={tmp_path / 'report.pdf'}")
    assert ":CONSOLE" not in done.stderr, done.stderr
    pdf = (tmp_path / "report.pdf").read_bytes()
    assert pdf.startswith(b"%PDF")
    assert 2 <= len(re.findall(rb"/Type\s*/Page\b", pdf)) <= 12
