"""Some damaged files and every bomb: the micro forms of benchmarks/fuzz.py and fuzz_models.py, which run 20,000 cases when they are asked to."""

from benchmarks import fuzz, fuzz_models


def test_damaged_files_are_read_or_refused_by_name() -> None:
    record = fuzz.in_process(100, seed=5)
    assert sum(record["outcomes"].values()) == 100
    assert {name.split()[1] for name in record["outcomes"]} >= {"ok", "data-damaged", "params-syntax", "params-invalid"}


def test_a_whole_process_ends_in_time_with_one_message_and_leaves_what_was_there() -> None:
    record = fuzz.whole_processes(2, seed=5)
    assert record["outcomes"].keys() <= {"exit 0", "exit 2"}
    assert record["bombs"].keys() == fuzz.BOMBS.keys()
    assert record["bombs"]["NUL"]["exit"] == 0


def test_damaged_files_of_models_and_of_dvc_are_read_or_refused_by_name() -> None:
    record = fuzz_models.fuzz(140, seed=5)
    kinds = {name.split(": ")[0] for name in record["outcomes"]}
    assert len(kinds) == 14
    assert sum(record["outcomes"].values()) == 140
