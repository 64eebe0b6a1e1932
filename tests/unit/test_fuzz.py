"""Some damaged files and every bomb, the micro form of benchmarks/fuzz.py, which runs 20,000 and 200 more (benchmarks/results/fuzz.json)."""

from benchmarks import fuzz


def test_damaged_files_are_read_or_refused_by_name() -> None:
    record = fuzz.in_process(200, seed=5)
    assert sum(record["outcomes"].values()) == 200
    assert {name.split()[1] for name in record["outcomes"]} >= {"ok", "data-damaged", "params-syntax", "params-invalid"}


def test_a_whole_process_ends_in_time_with_one_message_and_leaves_what_was_there() -> None:
    record = fuzz.whole_processes(2, seed=5)
    assert record["outcomes"].keys() <= {"exit 0", "exit 2"}
    assert record["bombs"].keys() == fuzz.BOMBS.keys()
    assert record["bombs"]["NUL"]["exit"] == 0
