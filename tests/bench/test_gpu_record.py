"""`python -m tests.gpu` and its tables, on a CPU: limits, order, rows that outlive any end, every figure shown."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import REPOSITORY
from tests.gpu.__main__ import ITEMS, Item, run_all
from tests.gpu.benchmarks import BENCHMARKS
from tests.gpu.tables import tables
from tests.markers import BEGIN, END, put_between

WRITE_ROW = "import os; open(os.environ['GPU_ROWS'], 'a').write('{\"figure\": 1}\\n')"


def item(name: str, script: str, estimate: float = 0, limit: float = 600) -> Item:
    return Item(name, f"the item {name}", ("-c", script), estimate, limit)


def run(items: list[Item], folder: Path, seconds: float = 600) -> tuple[int, list[dict[str, Any]]]:
    """With `device` cuda, because limits are longer for a CPU; none of these scripts looks at it."""
    lost = run_all(items, "cuda", seconds, folder / "gpu.json")
    return lost, json.loads((folder / "gpu.json").read_text())["items"]


def test_what_becomes_of_an_item(tmp_path: Path) -> None:
    lost, found = run(
        [
            item("good", WRITE_ROW),
            item("bad", f"{WRITE_ROW}; raise SystemExit('out of order')"),
            item("hung", f"{WRITE_ROW}; import time; time.sleep(600)", limit=2),
            item("long", WRITE_ROW, estimate=601),
            item("last", WRITE_ROW),
        ],
        tmp_path,
    )
    assert lost == 2
    assert [(each["name"], each["status"]) for each in found] == [
        ("good", "done"),
        ("bad", "failed"),
        ("hung", "killed at its limit"),
        ("long", "left out"),
        ("last", "done"),
    ]
    assert all(each["rows"] == [{"figure": 1}] for each in found if each["name"] in ("good", "bad", "last"))
    assert "out of order" in found[1]["output"]
    assert "it takes about 601" in found[3]["why"]


def test_a_killed_run_leaves_what_it_has_measured(tmp_path: Path) -> None:
    """SIGKILL in the middle of an item, right after its first row."""
    file = tmp_path / "gpu.json"
    script = (
        "from pathlib import Path; from tests.gpu.__main__ import Item, run_all\n"
        f"work = {WRITE_ROW + '; import time; time.sleep(600)'!r}\n"
        f"run_all([Item('long', 'x', ('-c', work), 0, 600)], 'cuda', 600, Path({str(file)!r}))"
    )
    process = subprocess.Popen([sys.executable, "-c", script], cwd=REPOSITORY, start_new_session=True)
    while not (file.exists() and '"figure"' in file.read_text()):
        assert process.poll() is None
        time.sleep(0.05)
    (sleeper,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.kill()
    process.wait()
    os.kill(int(sleeper), signal.SIGKILL)  # nobody else ends it: its parent could not
    (found,) = json.loads(file.read_text())["items"]
    assert (found["status"], found["rows"]) == ("running", [{"figure": 1}])


def test_every_benchmark_is_an_item() -> None:
    assert set(BENCHMARKS) == {item.name for item in ITEMS} - {"tests", "giant"}
    assert all(item.estimate < item.limit for item in ITEMS)


@pytest.fixture(scope="module")
def dry(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Three items as they are, at their small sizes."""
    file = tmp_path_factory.mktemp("dry") / "gpu.json"
    chosen = [item for item in ITEMS if item.name in ("inference-ours", "inference-torchvision", "backends")]
    assert run_all(chosen, "cpu", 3600, file) == 0
    content: dict[str, Any] = json.loads(file.read_text())
    return content


def test_measured_rows_become_tables(dry: dict[str, Any]) -> None:
    text = tables([dry])
    assert "a CPU, at small sizes that mean nothing" in text
    ours, peer = (dry["items"][number]["rows"] for number in (0, 1))
    assert [row["batch"] for row in ours] == [row["batch"] for row in peer] == [1, 2]
    best, other = (max(row["clips_per_second"] for row in rows) for rows in (ours, peer))
    (line,) = [line for line in text.splitlines() if line.startswith("| ours") and f"{best / other:.2f} |" in line]
    assert f" {best:.3g} |" in line
    assert text.count("| sequential") == 2
    assert "flex" in text
    assert "not run: compiled on CUDA only" in text
    assert "### Not measured" not in text


def test_rows_of_tests_become_tables() -> None:
    """As a machine with eight GPUs would write them."""
    error = {"backend": "flex", "precision": "bf16", "output_error": 0.01, "gradient_error": 0.1}
    rows = [
        {"test": "tests/gpu/test_attention.py::test_a[x]", "outcome": "passed", **error},
        {"test": "tests/gpu/test_attention.py::test_a[y]", "outcome": "passed", **error, "output_error": 0.02},
        {"test": "tests/gpu/test_runs.py::test_b", "outcome": "failed", "why": "def f():\nE   assert 1 == 2\nmore"},
        {"test": "tests/gpu/test_engines.py::test_c", "outcome": "skipped", "why": "Skipped: needs two GPUs"},
        {"test": "tests/gpu/test_memory.py::test_d[base]", "outcome": "passed", "planned_bytes": 11 * 2**30,
         "measured_bytes": 10 * 2**30},
    ]  # fmt: skip
    facts = {"gpus": ["H100"] * 8, "driver": "580", "commit": "a" * 40, "changed_files": 0, "python": "3.12"}
    items = [
        {"name": "tests", "what": "all tests", "status": "killed at its limit", "rows": rows},
        {"name": "engines", "what": "ZeRO", "status": "left out", "why": "9 s were left"},
    ]
    text = tables([{"facts": facts, "items": items}])
    for words in (
        "8 x H100, driver 580", "| flex | bf16 | 2.0e-02 | 1.0e-01 |", "| test_d[base] | 11.00 | 10.00 | +10.0% |",
        "3 passed, 1 failed, 1 skipped.", "`test_runs.py::test_b`: assert 1 == 2", "* skipped: needs two GPUs",
        "* all tests: killed at its limit", "* ZeRO: left out (9 s were left)",
    ):  # fmt: skip
        assert words in _narrow(text)


def test_a_later_run_replaces_the_figures_of_an_item() -> None:
    facts = {"gpus": ["H200"], "driver": "580", "commit": "a" * 40, "changed_files": 0, "python": "3.12"}
    step = {"way": "ours", "model": "swinv2_base", "frames": 32, "pixels": 224, "precision": "bf16", "batch": 1,
            "flops_per_clip": 1e12, "peak_bytes": 2**30}  # fmt: skip
    first = {"facts": facts, "items": [
        {"name": "training-ours", "what": "training", "status": "done",
         "rows": [step | {"clips_per_second": 3.0, "step_seconds": 0.333}]},
        {"name": "engines", "what": "ZeRO", "status": "left out", "why": "9 s were left"},
        {"name": "races", "what": "races", "status": "left out", "why": "8 s were left"},
    ]}  # fmt: skip
    second = {"facts": facts | {"commit": "b" * 40}, "items": [
        {"name": "training-ours", "what": "training", "status": "done",
         "rows": [step | {"clips_per_second": 4.0, "step_seconds": 0.25}]},
        {"name": "engines", "what": "ZeRO", "status": "done", "rows": [
            {"way": "ZeRO-1", "batch": 4, "processes": 1, "clips_per_second": 2.5, "peak_bytes": 2**30,
              "tflops": 40.0}]},
    ]}  # fmt: skip
    text = _narrow(tables([first, second]))
    assert "| ours | 1 | 4 | 0.25 |" in text
    assert "0.333" not in text
    assert "| ZeRO-1 | 4 x 1 | 2.5 |" in text
    assert "races: left out (8 s were left)" in text
    assert "9 s were left" not in text
    assert "commit aaaaaaaaaa; commit bbbbbbbbbb." in text
    with pytest.raises(ValueError, match="different GPUs"):
        tables([first, second | {"facts": facts | {"gpus": ["H100"]}}])


def _narrow(text: str) -> str:
    """Without the padding of table cells."""
    return "\n".join(" ".join(line.split()) for line in text.splitlines())


def test_tables_replace_what_is_between_the_markers() -> None:
    page = (REPOSITORY / "docs" / "gpu.md").read_text(encoding="utf-8")
    once = put_between(page, "the tables of a run")
    assert put_between(once, "newer tables") == once.replace("the tables of a run", "newer tables")
    assert once.startswith(page.partition(BEGIN)[0])
    assert once.endswith(page.partition(END)[2])
    with pytest.raises(ValueError, match="followed by"):
        put_between(f"{END} {BEGIN}", "text")
