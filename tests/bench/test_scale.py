"""The benchmark of growth: exponents are those of the costs, and the lists that it measures are really used."""

from __future__ import annotations

import pytest

from video_swinv2.bench.scale import Growth, bench_scale, fitted_exponent, list_growths, scale_table


def test_exponents_are_those_of_power_laws() -> None:
    sizes = (10, 20, 80)
    assert fitted_exponent(sizes, [3 * n**1.5 for n in sizes]) == pytest.approx(1.5)
    # The line through (0, 0), (ln 2, 0), (ln 4, ln 4) has the slope 1: by hand, the covariance over the variance.
    assert fitted_exponent((1, 2, 4), (1, 1, 4)) == pytest.approx(1.0)
    assert Growth("loading", "workers", "CPU s", (0, 1, 2), (1.0, 1.0, 1.0)).exponent is None, "0 has no logarithm"


def test_what_lists_cost_grows_with_their_rows() -> None:
    growths = {(one.work, one.unit): one for one in list_growths((2000, 500))}
    assert all(one.sizes == (500, 2000) and min(one.costs) > 0 for one in growths.values())
    assert {work for work, _ in growths} == {
        "reading a list",
        "order of an epoch",
        "planning a preparation",
        "writing its state",
    }
    table = scale_table(
        {
            "model": "m",
            "torch": "t",
            "rounds": 1,
            "growths": [
                {
                    "work": "reading",
                    "quantity": "rows",
                    "unit": "CPU s",
                    "sizes": (1000, 2000),
                    "costs": (1.0, 2.0),
                    "exponent": 1.0,
                    "expected": 1,
                },
                {
                    "work": "loading",
                    "quantity": "workers",
                    "unit": "CPU s",
                    "sizes": (0, 1),
                    "costs": (1.0, 1.25),
                    "exponent": None,
                    "expected": None,
                },
            ],
        }
    )
    first, second = (
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in table.splitlines()
        if "reading" in line or "loading" in line
    )
    assert first == ["reading", "rows", "1,000 2,000", "1 2", "CPU s", "1.00", "1"]
    assert second == ["loading", "workers", "0 1", "1 1.25", "CPU s", "", ""]


@pytest.mark.slow
def test_everything_is_measured() -> None:
    growths = bench_scale((200, 400), rounds=1)["growths"]
    assert [one["work"] for one in bench_scale((200, 400), rounds=1, parts=["lists"])["growths"]] == [
        one["work"] for one in growths if one["quantity"] == "rows"
    ]
    assert {one["quantity"] for one in growths} >= {
        "clips in a batch",
        "frames",
        "classes",
        "workers",
        "processes",
        "rows",
    }
    assert all(cost > 0 for one in growths for cost in one["costs"])
