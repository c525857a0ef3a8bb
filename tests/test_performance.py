"""docs/performance.md and the README say what the kept results of the benchmarks say."""

from tests.performance import BENCHMARKS, HEADLINES, KEPT, pages


def test_the_page_and_the_readme_are_those_of_the_kept_results() -> None:
    for path, text in pages().items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name}: run `python -m tests.performance page`"


def test_every_kept_result_and_every_headline_belongs_to_a_benchmark() -> None:
    assert {file.stem for file in KEPT.glob("*.json")} <= set(BENCHMARKS)
    assert {line.benchmark for line in HEADLINES} <= set(BENCHMARKS)
