"""docs/performance.md says what the results say: what is met, what falls short, what has not been measured."""

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from benchmarks import performance
from benchmarks.__main__ import NAMES, run_in_turn
from benchmarks.gpu import SECTIONS

ROOT = Path(__file__).parents[2]


def training(rate: float, tflops: float, **others: Any) -> dict[str, Any]:
    """As benchmarks/gpu.py writes one."""
    known = {"updates": 5, "peak_gib": 9.1, "peak_reserved_gib": 9.9, "estimated_gib": 9.0, "estimate_to_peak": 0.99}
    return {"tokens_per_second": rate, "tflops": tflops, **known, **others}


H200 = {
    "machine": {"gpu": "NVIDIA H200", "memory_gib": 139.8, "cuda": "13.0", "torch": "2.13.0"},
    "whole": ["matrix_products", "training", "plain_trl", "deterministic", "resume"],
    "sections": {
        "matrix_products": {"bfloat16": {"size": 8192, "tflops": 700.0}},
        "training": {
            "varlen, checkpointing, 2 rows": training(9400.0, 420.0, slowest_and_fastest_update=[9200.0, 9450.0]),
            "varlen, none recomputed, 1 row": training(13_500.0, 385.0, estimate_to_peak=0.88),
            "varlen, none recomputed, 2 rows": {"failed": "OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB"},
        },
        "training_16bit": {"flash_attention_2, checkpointing, 1 row": {"failed": "ImportError: no kernel"}},
        "deterministic": {
            **{f"deterministic, {number}": training(rate, 1.0) for number, rate in ((1, 8000.0), (2, 9000.0), (3, 8500.0))},
            **{f"as they come, {number}": training(rate, 1.0) for number, rate in ((1, 8800.0), (2, 9000.0), (3, 8500.0))},
        },
        "plain_trl": {"plain TRL": {"tokens_per_second": 6000.0}, "the recipe": training(9600.0, 400.0, times_plain=1.6)},
        "within_24_gb": {
            "2 rows": training(9100.0, 400.0, peak_reserved_gib=12.5),
            "4 rows": training(10_000.0, 410.0, peak_reserved_gib=15.5),
            "8 rows": {"failed": "OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB"},
        },
        "answers": {"tuned, batches of 64": {"answers": 500, "seconds": 60.0, "tokens_per_second": 1066.7, "peak_reserved_gib": 20.0}},
        "resume": {"adamw_torch": {"twice_the_same": True, "resumed_the_same": False}},
    },
}


def lines_of(results: Path, **records: Mapping[str, Any]) -> list[str]:
    """The page of made-up results."""
    for name, record in records.items():
        (results / f"{name}.json").write_text(json.dumps(record), encoding="utf-8")
    return performance.page(results).splitlines()


def only(lines: list[str], beginning: str) -> str:
    (found,) = [line for line in lines if line.startswith(beginning)]
    return found


def committed(name: str) -> Any:
    return json.loads((performance.RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def test_the_page_is_what_the_committed_results_make() -> None:
    assert performance.PAGE.read_text(encoding="utf-8") == performance.page(performance.RESULTS), "run python -m benchmarks.performance"


def test_every_benchmark_that_make_bench_runs_has_its_part_of_the_page() -> None:
    # The rehearsal takes an hour, and is run by itself.
    assert {*NAMES, "rehearsal"} == set(performance.SUBJECTS)
    assert all((ROOT / goal.measured_by).exists() for goal in performance.GOALS.values() if goal.measured_by != "nothing yet")


def test_without_results_every_goal_is_said_to_be_not_measured(tmp_path: Path) -> None:
    lines = lines_of(tmp_path)
    assert "**0 of 0 measured goals are met; not measured: 21.**" in lines
    part = lines[lines.index("## Not measured") : lines.index("## Machines")]
    assert [line for line in part if line.startswith("| ")][1:] == [
        f"| {goal.what} | {goal} | {goal.measured_by} |" for goal in performance.GOALS.values()
    ]
    assert [line.split()[2].rstrip(",") for line in part if line.startswith("Nothing of")] == [
        f"benchmarks/{name}.py" for name in performance.SUBJECTS
    ]
    assert all(section.replace("_", " ") in only(part, "Nothing of benchmarks/gpu.py") for section in SECTIONS)


def test_a_figure_that_misses_its_goal_falls_short_here_and_in_the_first_lines(tmp_path: Path) -> None:
    record = committed("train_cpu") | {"times_bare": [0.95, 0.96, 0.98], "times_bare_median": 0.96}
    lines = lines_of(tmp_path, train_cpu=record)
    row = only(lines, "| rate of training |")
    assert "0.960 times (0.950 to 0.980)" in row
    assert row.endswith("| at least 0.97 times | **falls short** |")
    assert only(lines, "**0 of 1 measured goals are met; not measured: 20.").endswith(
        "Falls short: training on a CPU, to a bare SFTTrainer (at least 0.97 times)."
    )


@pytest.mark.parametrize(
    ("ratios", "verdict"), [([0.97, 0.98, 0.99], "met"), ([0.96, 0.98, 0.99], "met, not in every round"), ([0.9, 0.96, 0.99], "**falls short**")]
)
def test_a_median_that_meets_its_goal_does_not_hide_a_round_that_does_not(tmp_path: Path, ratios: list[float], verdict: str) -> None:
    lines = lines_of(tmp_path, train_cpu=committed("train_cpu") | {"times_bare": ratios, "times_bare_median": ratios[1]})
    assert only(lines, "| rate of training |").split(" | ")[-1] == f"{verdict} |"


def test_a_rehearsal_shows_peaks_beside_estimates_and_what_is_missing(tmp_path: Path) -> None:
    record = {
        "machine": {"cpu": "X", "memory_gib": 23.5},
        "recipe": "llama3-8b-rtx4090",
        "shapes": {"rehearsal-small": "llama3.2-1b", "rehearsal-large": "llama3-8b"},
        "estimated_gib": {"train, resumed": 9.25},
        "steps": {
            "train, resumed": {"what": "train", "seconds": 900.0, "peak_gib": 9.5, "resumed": True, "losses": [12.18, 12.17]},
            "large: pin": {"what": "pin", "seconds": 59.5, "peak_gib": 0.05},
        },
        "without_result": ["merge"],
    }
    lines = lines_of(tmp_path, rehearsal=record)
    assert only(lines, "| llama3.2-1b: train |") == (
        "| llama3.2-1b: train | 9.50 GiB | estimate: 9.25 GiB; 900 s; resumed; losses 12.180, 12.170 |  |  |"
    )
    assert only(lines, "| llama3-8b: pin |") == "| llama3-8b: pin | 0.050 GiB | 59.5 s |  |  |"
    assert "No result yet of: merge." in lines
    assert any(line.endswith("X, 23.5 GiB |") for line in lines)


def test_prepare_of_whatever_sizes_are_there(tmp_path: Path) -> None:
    large, larger = "prepare, 520,000 short rows", "prepare, 5,200,000 short rows"
    medium = {"datasets, 370 characters": [6.0], "prepare, near duplicates, 370 characters": [5.0]}
    seconds = {"datasets": [10.0, 12.0], "prepare": [2.0, 3.0], large: [10.0], larger: [160.0], **medium}
    peaks = {"datasets": 400.0, "prepare": 140.0, large: 150.0, larger: 200.0, **dict.fromkeys(medium, 100.0)}
    lines = lines_of(tmp_path, prepare={"machine": {"cpu": "X"}, "rows": 52_000, "seconds": seconds, "peak_mb_of_all_processes": peaks})
    assert only(lines, "| 52,000 rows, exact").endswith("| at least 4 times | met |")
    assert "| 4.50 times as fast (4.00 to 5.00) |" in only(lines, "| 52,000 rows, exact")
    assert only(lines, "| 52,000 rows of 370 characters, near").endswith("| at least 1.5 times | **falls short** |")
    assert only(lines, "| 5,200,000 rows") == "| 5,200,000 rows of 500 characters, exact checks | 160 s |  | at most 150 s | **falls short** |"
    assert (
        only(lines, "| its seconds a row |") == "| its seconds a row | 1.600 times | those of 520,000 rows | at most 1.15 times | **falls short** |"
    )
    assert only(lines, "| its peak memory |").endswith("| at most 2,000 MB | met |")


def test_a_gpu_has_a_table_with_the_goals_that_are_meant_for_it(tmp_path: Path) -> None:
    lines = lines_of(tmp_path, gpu={"NVIDIA H200": H200})
    assert "## Training on one NVIDIA H200" in lines
    assert only(lines, "| training, 4 bits, varlen, none").endswith("| at least 13,000 tokens/s | met |")
    row = only(lines, "| training, 4 bits, varlen, checkpointing")
    assert "| 9,400 tokens/s (9,200 to 9,450) | 60 % of the limit; peak 9.10 GiB of tensors, 9.90 from the driver |" in row
    assert row.endswith("| at least 9,500 tokens/s | **falls short** |")
    assert only(lines, "| share of the limit, at best |").startswith(
        "| share of the limit, at best | 60.0 % | 4 bits, varlen, checkpointing, 2 rows |"
    )
    assert only(lines, "| memory estimated before a run").endswith("| within 10 % | **falls short** |")
    assert only(lines, "| training, the recipe |").endswith("| at least 1.5 times | met |")
    assert "| 1.000 times (1.000 to 1.100) |" in only(lines, "| time of an update in deterministic mode |")
    # More than 12 GiB, but 0.91 of the best rate.
    row = only(lines, "| peak memory of the recipe")
    assert "| 12.5 GiB | its rate is 0.910 of the best" in row
    assert row.endswith("| met |")
    assert only(lines, "| 500 answers") == "| 500 answers, tuned, batches of 64 | 60.0 s | 1,067 tokens/s, 20.0 GiB |  |  |"
    assert "twice the same bytes: yes; after a stop the same bytes: **no**" in only(lines, "| an eighth of the model, adamw_torch |")
    assert only(lines, "Did not run:") == (
        "Did not run: `training`: varlen, none recomputed, 2 rows; `within_24_gb`: 8 rows (OutOfMemoryError: CUDA out of memory); "
        "`training_16bit`: flash_attention_2, checkpointing, 1 row (ImportError: no kernel)."
    )
    assert only(lines, "Cut short") == "Cut short, so that variants are missing: `training_16bit`; `within_24_gb`; `answers`."
    assert only(lines, "No result of:") == "No result of: `loading_time`; `other_attention`."
    assert "| [gpu.json](../benchmarks/results/gpu.json) | NVIDIA H200, 139.8 GiB, cuda 13.0, torch 2.13.0 |" in lines
    assert only(lines, "**5 of 7 measured goals are met; not measured: 14.")


def test_another_gpu_is_not_judged_by_the_goals_of_an_h200(tmp_path: Path) -> None:
    lines = lines_of(tmp_path, gpu={"NVIDIA H100": {**H200, "machine": H200["machine"] | {"gpu": "NVIDIA H100"}}})
    assert only(lines, "| training, 4 bits, varlen, none").endswith("|  |  |")
    assert only(lines, "| Llama-3-8B in 4 bits, r 16 on all linear layers, rows of 3,072 tokens, on an H200 without")


def test_a_trial_of_the_gpus_program_is_no_figure(tmp_path: Path) -> None:
    lines = lines_of(tmp_path, gpu={"cpu": {"machine": {"gpu": None}, "sections": H200["sections"]}, "NVIDIA H200, tiny": H200})
    assert lines == lines_of(tmp_path, gpu={})
    assert only(lines, "Nothing of benchmarks/gpu.py")


def test_a_failing_benchmark_does_not_hide_the_others(capfd: pytest.CaptureFixture[str]) -> None:
    commands = {"first": "print('much')", "second": "raise SystemExit('torn')", "third": "pass"}
    assert run_in_turn({name: [sys.executable, "-c", code] for name, code in commands.items()}) == ["second"]
    said = capfd.readouterr()
    assert re.sub(r"\d+ s", "0 s", said.out) == "first: 0 s\nsecond: 0 s, failed with 1\nthird: 0 s\n"
    assert said.err == "torn\n\n"
