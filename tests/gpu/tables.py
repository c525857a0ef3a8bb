"""Makes the tables of docs/gpu.md from JSON files of `python -m tests.gpu`.

python -m tests.gpu.tables gpu.json                       prints them
python -m tests.gpu.tables gpu.json --page docs/gpu.md    puts them between the two markers of that page

Of several files, which have to be of one kind of GPU, the last one with figures of an item gives them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tests.markers import put_between
from video_swinv2.bench.measuring import table_text

Row = dict[str, Any]


def tables(runs: Sequence[dict[str, Any]]) -> str:
    """The tables of one or several runs, as Markdown. Raises ValueError for runs on different kinds of GPU."""
    if len(kinds := {str(run["facts"].get("gpus")) for run in runs}) > 1:
        raise ValueError(f"{' and '.join(sorted(kinds))}: figures of different GPUs do not belong into one table")
    latest = {item["name"]: item for run in runs for item in run["items"] if item.get("rows")}
    not_run = {item["name"]: item for run in runs for item in run["items"] if item["name"] not in latest}
    items: dict[str, list[Row]] = {name: item["rows"] for name, item in latest.items()}
    product = next((row["tflops"] for row in items.get("products", []) if row["precision"] == "bf16"), None)
    tests = [row for name in ("tests", "giant") for row in items.get(name, [])]
    parts = [
        _facts(runs, product),
        _speed("Training: the best batch of each", items, "training", product, 1),
        _speed("Inference: the best batch of each", items, "inference", product, 1),
        _speed("Every batch", items, "training", product, None),
        _speed("", items, "inference", product, None),
        _engines(items.get("engines", []), product),
        _backends(items.get("backends", [])),
        _dense(items.get("dense", [])),
        _accuracy(tests),
        _memory(tests),
        _outcomes(tests),
        _missing([*latest.values(), *not_run.values()]),
    ]
    return "\n\n".join(part for part in parts if part)


def _facts(runs: Sequence[dict[str, Any]], product: float | None) -> str:
    """What everything was measured on, in one paragraph."""
    facts = runs[0]["facts"]
    gpus = facts.get("gpus") or []
    device = f"{len(gpus)} x {gpus[0]}, driver {facts['driver']}" if gpus else "a CPU, at small sizes that mean nothing"
    text = (
        f"Measured on {device}; torch {facts.get('torch')}, CUDA {facts.get('cuda')}, NCCL {facts.get('nccl')}, Python "
        f"{facts['python']}, {'; '.join(dict.fromkeys(_commit(run['facts']) for run in runs))}"
    )
    return text + ("." if product is None else f". A large matrix product in bf16 reaches {product:.3g} TFLOP/s.")


def _commit(facts: dict[str, Any]) -> str:
    text = f"commit {(facts['commit'] or 'unknown')[:10]}"
    return f"{text} with {facts['changed_files']} changed files" if facts["changed_files"] else text


def _speed(title: str, items: dict[str, list[Row]], what: str, product: float | None, best: int | None) -> str:
    """Clips per second of each way: of its `best` batches, or of all if that is None."""
    ways = [items.get(f"{what}-{way}", []) for way in ("ours", "compiled", "torchvision")]
    measured = [[row for row in rows if "not_run" not in row] for rows in ways]
    peers = [row["clips_per_second"] for row in measured[2]]
    table = []
    for rows, all_rows in zip(measured, ways, strict=True):
        ordered = sorted(rows, key=lambda row: -row["clips_per_second"])[:best] if best else all_rows
        table += [_speed_row(row, what, product, max(peers, default=None) if best else None) for row in ordered]
    if not table:
        return ""
    first = next(row for rows in ways for row in rows)
    size = f"{first['model']}, {first['frames']}x{first['pixels']}x{first['pixels']}, {first['precision']}"
    columns = [f"{what}, {size}", "batch", "clips/s", "s/step", "peak GiB", "TFLOP/s", "of a large product"]
    columns += ["of torchvision's clips/s"] if best else []
    return "\n\n".join(filter(None, [f"### {title}" if title else "", table_text(columns, table)]))


def _speed_row(row: Row, what: str, product: float | None, peer: float | None) -> list[str]:
    if "not_run" in row:
        return [row["way"], str(row["batch"]), "out of memory", "", "", "", ""]
    tflops = row["flops_per_clip"] * row["clips_per_second"] / 1e12
    cells = [row["way"], str(row["batch"]), f"{row['clips_per_second']:.3g}", f"{row['step_seconds']:.3g}"]
    cells += [f"{row['peak_bytes'] / 2**30:.1f}", f"{tflops:.3g}", f"{tflops / product:.0%}" if product else ""]
    return cells + ([f"{row['clips_per_second'] / peer:.2f}"] if peer else [])


def _engines(rows: list[Row], product: float | None) -> str:
    if not rows:
        return ""
    table = []
    for row in rows:
        name = [row["way"], f"{row['batch']} x {row['processes']}"]
        if "not_run" in row:
            table.append([*name, f"not run: {row['not_run']}", "", "", ""])
            continue
        share = f"{row['tflops'] / product:.0%}" if product else ""
        figures = [f"{row['clips_per_second']:.3g}", f"{row['peak_bytes'] / 2**30:.1f}", f"{row['tflops']:.3g}", share]
        table.append([*name, *figures])
    columns = [
        "training under DeepSpeed",
        "batch x GPUs",
        "clips/s",
        "peak GiB",
        "TFLOP/s per GPU",
        "of a large product",
    ]
    return "### ZeRO\n\n" + table_text(columns, table)


def _backends(rows: list[Row]) -> str:
    """Milliseconds and peak of one attention layer by backend."""
    if not rows:
        return ""
    table = []
    for row in rows:
        figures = [f"not run: {row['not_run']}", ""] if "not_run" in row else [
            f"{1000 * row['seconds']:.2f}", f"{row['peak_bytes'] / 2**20:.0f}"
        ]  # fmt: skip
        what = "forward and backward" if row["gradients"] else "forward"
        table.append([row["backend"], str(tuple(row["window"])), what, str(row["batch"]), *figures])
    return "### Attention backends: one layer\n\n" + table_text(
        ["backend", "window", "pass", "clips", "ms", "peak MiB"], table
    )


def _dense(rows: list[Row]) -> str:
    """Images per second of a training step of each dense model by batch."""
    if not rows:
        return ""
    table = []
    for row in rows:
        pixels = row["pixels"]
        size = f"{pixels[0]}x{pixels[1]}" if isinstance(pixels, list) else f"{pixels}x{pixels}"
        figures = [row["not_run"], "", ""] if "not_run" in row else [
            f"{row['images_per_second']:.3g}", f"{row['step_seconds']:.3g}", f"{row['peak_bytes'] / 2**30:.1f}"
        ]  # fmt: skip
        table.append([row["way"], row["model"], size, str(row["batch"]), *figures])
    columns = ["training, bf16", "backbone", "image", "batch", "images/s", "s/step", "peak GiB"]
    return "### Detection and segmentation\n\n" + table_text(columns, table)


def _accuracy(tests: list[Row]) -> str:
    """The largest difference of each backend from eager in fp64, over all cases."""
    worst: dict[tuple[str, str], list[float]] = {}
    for row in tests:
        if "output_error" in row:
            key = (row["backend"], row["precision"])
            before = worst.get(key, [0.0, 0.0])
            worst[key] = [max(a, row[b]) for a, b in zip(before, ("output_error", "gradient_error"), strict=True)]
    if not worst:
        return ""
    table = [[*key, f"{values[0]:.1e}", f"{values[1]:.1e}"] for key, values in sorted(worst.items())]
    columns = ["backend", "precision", "output", "worst gradient"]
    return "### Attention backends: difference from `eager` in fp64, of the largest value\n\n" + table_text(
        columns, table
    )


def _memory(tests: list[Row]) -> str:
    """What `plan` predicted beside what was measured; for the giant the measurement alone."""
    table = []
    for row in tests:
        if "measured_bytes" in row:
            planned, measured = row.get("planned_bytes"), row["measured_bytes"]
            difference = f"{planned / measured - 1:+.1%}" if planned else ""
            sizes = [f"{planned / 2**30:.2f}" if planned else "", f"{measured / 2**30:.2f}", difference]
            table.append([row["test"].rpartition("::")[2], *sizes])
    return "### Memory\n\n" + table_text(["test", "planned GiB", "measured GiB", "difference"], table) if table else ""


def _outcomes(tests: list[Row]) -> str:
    """How many tests passed, and which did not."""
    if not tests:
        return ""
    counts = {kind: [row for row in tests if row["outcome"] == kind] for kind in ("passed", "failed", "skipped")}
    lines = [f"### Tests\n\n{', '.join(f'{len(rows)} {kind}' for kind, rows in counts.items())}."]
    lines += [f"* failed: `{row['test'].rpartition('/')[2]}`: {_last_line(row['why'])}" for row in counts["failed"]]
    reasons = sorted({row.get("why", "") for row in counts["skipped"]})
    lines += [f"* skipped: {reason.removeprefix('Skipped: ')}" for reason in reasons]
    return "\n".join([lines[0], *(["", *lines[1:]] if lines[1:] else [])])


def _last_line(text: str) -> str:
    """The line of a pytest failure that names the error."""
    errors = [line[1:].strip() for line in text.splitlines() if line.startswith("E ")]
    return (errors or text.strip().splitlines() or [""])[0][:200]


def _missing(items: Iterable[dict[str, Any]]) -> str:
    """What did not run or did not get through, and why."""
    lines = [
        f"* {item['what']}: {item['status']}" + (f" ({item['why']})" if "why" in item else "")
        for item in items
        if item["status"] != "done"
    ]
    return "\n".join(["### Not measured", "", *lines]) if lines else ""


def main() -> None:
    """See the docstring of this module."""
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.tables", description=__doc__.splitlines()[0])
    parser.add_argument(
        "files", type=Path, nargs="+", help="JSON files that python -m tests.gpu wrote, the oldest first"
    )
    parser.add_argument("--page", type=Path, help="a page with the two markers; without it the tables are printed")
    options = parser.parse_args()
    text = tables([json.loads(file.read_text(encoding="utf-8")) for file in options.files])
    if options.page is None:
        print(text)
    else:
        page = options.page.read_text(encoding="utf-8")
        options.page.write_text(put_between(page, f"\n\n{text}\n\n"), encoding="utf-8")


if __name__ == "__main__":
    main()
