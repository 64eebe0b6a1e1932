"""Write docs/performance.md from what the benchmarks found: each figure beside what it is compared with and its goal, and what was not measured.

python -m benchmarks.performance     reads benchmarks/results/*.json, measures nothing
"""

import argparse
import itertools
import json
import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from benchmarks.gpu import SECTIONS

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parents[1] / "docs" / "performance.md"

Record = dict[str, Any]


@dataclass(frozen=True)
class Goal:
    what: str
    bound: Literal["at least", "at most", "within"]
    limit: float
    unit: str
    measured_by: str
    alternative: str = ""
    """A second way to meet it, in words; who measures it says whether it is met."""

    def __str__(self) -> str:
        return f"{self.bound} {self.limit:,g}{self.unit}{self.alternative}"

    def is_met_by(self, value: float) -> bool:
        return value >= self.limit if self.bound == "at least" else value <= self.limit


LARGE_ROWS = 5_200_000
PREPARE_ROWS = 52_000
PREPARE_GOALS = {
    ("exact checks", ""): "prepare",
    ("exact checks", "370"): "prepare short",
    ("near duplicates too", ""): "prepare near",
    ("near duplicates too", "370"): "prepare near short",
}
"""By what is checked and the length of a row."""
SHARE_OF_BEST_24_GB = 0.9
GPU, PREPARE = "benchmarks/gpu.py", "benchmarks/prepare.py"
LLAMA = "Llama-3-8B in 4 bits, r 16 on all linear layers, rows of 3,072 tokens"
GOALS = {
    "training": Goal("training on a CPU, to a bare SFTTrainer", "at least", 0.97, " times", "benchmarks/train_cpu.py"),
    "checkpoints": Goal("time of a training with five checkpoints, to one without", "at most", 1.03, " times", "benchmarks/checkpoint_cost.py"),
    "first update": Goal("first update of the default", "at most", 12, " s", "benchmarks/startup.py"),
    "tools": Goal("slowest `--help` of a tool, or `tools.recipes list`", "at most", 0.6, " s", "benchmarks/startup.py"),
    "no-op": Goal("`dvc repro` with nothing to run, to a plain repository's", "at most", 1.5, " times", "benchmarks/repro.py"),
    "no-op seconds": Goal("`dvc repro` with nothing to run", "at most", 1.5, " s", "benchmarks/repro.py"),
    "prepare": Goal("`prepare` of 52,000 rows with exact checks, to a plain program on `datasets`", "at least", 4, " times", PREPARE),
    "prepare short": Goal("the same with rows of 370 characters", "at least", 3, " times", PREPARE),
    "prepare near": Goal("`prepare` of 52,000 rows with all checks, to the same program", "at least", 1.5, " times", PREPARE),
    "prepare near short": Goal("the same with rows of 370 characters", "at least", 1.5, " times", PREPARE),
    "prepare seconds": Goal("`prepare` of 5,200,000 rows with exact checks", "at most", 150, " s", PREPARE),
    "prepare memory": Goal("peak memory of the same", "at most", 2000, " MB", PREPARE),
    "prepare cost": Goal("seconds a row of the same, to those of the next smaller size", "at most", 1.15, " times", PREPARE),
    "generation": Goal("answers in batches of 32, to one by one", "at least", 8, " times", "benchmarks/generate.py"),
    "gpu": Goal(f"{LLAMA}, on an H200 without activation checkpointing", "at least", 13_000, " tokens/s", GPU),
    "gpu checkpointing": Goal(f"{LLAMA}, on an H200 with activation checkpointing", "at least", 9_500, " tokens/s", GPU),
    "gpu plain": Goal("training, to the plain TRL default set-up", "at least", 1.5, " times", GPU),
    "gpu 24 GB": Goal(
        "peak memory of the recipe for a 24 GB card", "at most", 12, " GiB", GPU, f", or {SHARE_OF_BEST_24_GB} of the best rate within 22 GiB"
    ),
    "gpu deterministic": Goal("time of an update in deterministic mode, to the same as it comes", "at most", 1.15, " times", GPU),
    "gpu limit": Goal("arithmetic of a training, to products of large matrices", "at least", 55, " %", GPU),
    "gpu estimate": Goal("memory estimated before a run, to the measured peak", "within", 10, " %", GPU),
}


@dataclass(frozen=True)
class Figure:
    """A median and the ends of what was measured, where they are known."""

    median: float
    unit: str
    least: float | None = None
    most: float | None = None

    @classmethod
    def of(cls, values: Sequence[float], unit: str, median: float | None = None) -> "Figure":
        """Of rounds, with their median where the record has it: that was made before the values were rounded."""
        if len(values) == 1:
            return cls(values[0], unit)
        return cls(statistics.median(values) if median is None else median, unit, min(values), max(values))

    def __str__(self) -> str:
        if self.most is None:
            return f"{number(self.median)}{self.unit}"
        least = "at most" if self.least is None else f"{number(self.least)} to"
        return f"{number(self.median)}{self.unit} ({least} {number(self.most)})"


@dataclass(frozen=True)
class Row:
    what: str
    figure: Figure | str
    beside: str = ""
    goal: str | None = None
    """A name in GOALS."""
    met: bool | None = None
    """Where the figure alone does not decide it."""

    @property
    def meets(self) -> bool | None:
        if self.goal is None:
            return None
        if self.met is not None or isinstance(self.figure, str):
            return self.met
        return GOALS[self.goal].is_met_by(self.figure.median)

    @property
    def verdict(self) -> str:
        if self.meets is None or self.goal is None:
            return ""
        if not self.meets:
            return "**falls short**"
        ends = [end for end in (self.figure.least, self.figure.most) if end is not None] if isinstance(self.figure, Figure) else []
        every_round = self.met is not None or all(GOALS[self.goal].is_met_by(end) for end in ends)
        return "met" if every_round else "met, not in every round"


@dataclass(frozen=True)
class Subject:
    title: str
    how: str
    rows: list[Row]
    notes: list[str] = field(default_factory=list)


def number(value: float) -> str:
    decimals = 3 if value < 2 else 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:,.{decimals}f}"


def ratios(above: Iterable[float], below: Iterable[float]) -> list[float]:
    """By round."""
    return [one / other for one, other in zip(above, below, strict=True)]


def startup(record: Record) -> list[Subject]:
    rounds = f"{record['rounds']} rounds" if "rounds" in record else "rounds not recorded"
    medians, most = record["seconds_median"], record["seconds_most"]
    first = "first update of the default"
    tools = [name for name in medians if name != first]
    slowest = max(tools, key=medians.__getitem__)
    rows = [
        Row("first update of the default", Figure(medians[first], " s", most=most[first]), "", "first update"),
        Row(f"slowest of {len(tools)} tool commands, `{slowest}`", Figure(medians[slowest], " s", most=max(map(most.get, tools))), "", "tools"),
    ]
    return [Subject("Start-up", f"`python -m benchmarks.startup`, {rounds}; from the command until something happens.", rows)]


def repro(record: Record) -> list[Subject]:
    ours, plain = record["nothing_to_run"]["ours"], record["nothing_to_run"]["plain"]
    beside = f"a plain repository of four stages: {number(statistics.median(plain))} s against {number(statistics.median(ours))} s"
    rows = [
        Row("nothing to run", Figure.of(ratios(ours, plain), " times", record["times_plain_median"]), beside, "no-op"),
        Row("the same in seconds", Figure.of(ours, " s"), "", "no-op seconds"),
        Row("one param of `predict` changed: three stages run", Figure(record["one_param_of_predict"], " s")),
        Row("changed back: taken from the run cache", Figure(record["changed_back_from_the_run_cache"], " s")),
    ]
    return [Subject("`dvc repro` with little to do", f"`python -m benchmarks.repro`, {len(ours)} rounds.", rows)]


@dataclass(frozen=True)
class PrepareRun:
    program: str
    rows: int
    length: str
    """Characters of a row; "" for no_robots' 1,230."""
    seconds: list[float]
    peak_mb: Figure


def prepare_runs(record: Record) -> list[PrepareRun]:
    """What a run did stands in its name: `datasets` or `prepare`, its checks, its rows and their length if they are not those of the record."""
    runs = []
    for name, seconds in record["seconds"].items():
        size = re.search(r"\d[\d,_]{3,}", name)
        rows = int(re.sub(r"\D", "", size[0])) if size else record["rows"]
        program = "datasets" if "datasets" in name else "near duplicates too" if "near" in name else "exact checks"
        program += ", one process" if "one process" in name else ""
        peak = record["peak_mb_of_all_processes"][name]
        length = "500" if "short" in name else "370" if "370" in name else ""
        runs.append(PrepareRun(program, rows, length, seconds, Figure.of(peak, " MB") if isinstance(peak, list) else Figure(peak, " MB")))
    return runs


def prepare(record: Record) -> list[Subject]:
    runs = prepare_runs(record)
    plain = {(run.rows, run.length): run for run in runs if run.program == "datasets"}
    rows = []
    for run in runs:
        if run.program == "datasets" or (run.rows, run.length) not in plain:
            continue
        theirs = plain[run.rows, run.length]
        beside = f"a plain program on `datasets`: {number(statistics.median(theirs.seconds))} s against {number(statistics.median(run.seconds))} s"
        of = f" of {run.length} characters" if run.length else ""
        goal = PREPARE_GOALS.get((run.program, run.length)) if run.rows == PREPARE_ROWS else None
        rows.append(Row(f"{run.rows:,} rows{of}, {run.program}", Figure.of(ratios(theirs.seconds, run.seconds), " times as fast"), beside, goal))
    sizes: dict[str, list[PrepareRun]] = defaultdict(list)
    for run in sorted((run for run in runs if run.length == "500"), key=lambda run: run.rows):
        sizes[run.program].append(run)
    for program, found in sizes.items():
        for before, run in itertools.pairwise(found):
            what = f"{run.rows:,} rows of 500 characters, {program}"
            cost = statistics.median(run.seconds) / run.rows / (statistics.median(before.seconds) / before.rows)
            there = f"{number(before.peak_mb.median)} MB at {before.rows:,} rows"
            if (program, run.rows) == ("exact checks", LARGE_ROWS):
                rows += [
                    Row(what, Figure.of(run.seconds, " s"), "", "prepare seconds"),
                    Row("its peak memory", run.peak_mb, there, "prepare memory"),
                    Row("its seconds a row", Figure(cost, " times"), f"those of {before.rows:,} rows", "prepare cost"),
                ]
            else:
                beside = f"{number(cost)} times the seconds a row of {before.rows:,} rows; {number(run.peak_mb.median)} MB at most, {there}"
                rows.append(Row(what, Figure.of(run.seconds, " s"), beside))
    counts = [len(run.seconds) for run in runs]
    rounds = f"{min(counts)} to {max(counts)} rounds" if min(counts) < max(counts) else f"{counts[0]} rounds"
    how = f"`python -m benchmarks.prepare`, {rounds}; memory of all processes together. Where no length is said, rows are as long as no_robots'."
    return [Subject("`prepare`", how, rows)]


def train_cpu(record: Record) -> list[Subject]:
    ours, bare = (statistics.median(record["tokens_per_second"][name]) for name in ("ours", "bare"))
    beside = f"a bare SFTTrainer with the same settings: {number(bare)} tokens/s against {number(ours)}"
    rows = [Row("rate of training", Figure.of(record["times_bare"], " times", record["times_bare_median"]), beside, "training")]
    how = f"`python -m benchmarks.train_cpu`, {len(record['times_bare'])} rounds of {record['steps']} updates of the embedded default."
    note = f"The noise: the bare trainer's slowest round ran at {number(record['bare_slowest_to_fastest'])} of the rate of its own fastest."
    return [Subject("Training on a CPU", how, rows, [note]), *ways_of_waiting(record.get("threads", {}))]


def ways_of_waiting(record: Record) -> list[Subject]:
    if not record:
        return []
    rates = record["tokens_per_second"]
    rows = []
    for name, found in rates.items():
        for place, words in (("alone", "alone"), ("beside", "beside a busy process")):
            times = statistics.median(ratios(found[place], rates["as it is"][place]))
            beside = "" if name == "as it is" else f"{number(times)} times the rate as it is"
            rows.append(Row(f"{name}, {words}", Figure.of(found[place], " tokens/s"), beside))
    how = (
        f"`python -m benchmarks.train_cpu --threads`, {record['steps']} updates of the embedded default on {record['machine']['cores']} cores. Its "
        "two threads spin while they wait for one another; GOMP_SPINCOUNT says how long."
    )
    return [Subject("Training on a CPU that others use too", how, rows)]


def checkpoint_cost(record: Record) -> list[Subject]:
    with_them, without = (statistics.median(record[f"seconds_{name}"]) for name in ("with", "without"))
    rows = [
        Row(
            "time of a training",
            Figure.of([1 + share for share in record["writing_shares"]], " times"),
            "itself without what writing them took",
            "checkpoints",
        ),
        Row(
            "time of a training, side by side",
            Figure.of(record["ratios"], " times"),
            f"one without checkpoints: {number(without)} s against {number(with_them)} s",
        ),
    ]
    how = f"`python -m benchmarks.checkpoint_cost`, {len(record['ratios'])} rounds of {record['steps']} updates, {record['checkpoints']} checkpoints."
    note = "Two equal trainings differ by more than checkpoints cost here, so the goal is judged by the time that writing took."
    return [Subject("Checkpoints", how, rows, [note])]


def generate(record: Record) -> list[Subject]:
    rates = record["answers_per_second"]
    one = statistics.median(rates["1"])
    rows = [
        Row(
            f"batches of {size}",
            Figure.of(ratios(found, rates["1"]), " times", record["times_one_by_one"][size]),
            f"one by one: {number(one)} answers/s against {number(statistics.median(found))}",
            "generation" if size == "32" else None,
        )
        for size, found in rates.items()
        if size != "1"
    ]
    how = f"`python -m benchmarks.generate`, {len(rates['1'])} rounds of {record['prompts']} prompts to the embedded base model."
    return [Subject("Answers", how, rows)]


def rehearsal(record: Record) -> list[Subject]:
    estimated, rows = record["estimated_gib"], []
    for name, step in record["steps"].items():
        shape = record["shapes"]["rehearsal-large" if name.startswith("large") else "rehearsal-small"]
        beside = [f"estimate: {number(estimated[name])} GiB"] if name in estimated else []
        beside.append(f"{number(step['seconds'])} s")
        if "losses" in step:
            losses = [f"{loss:.3f}" for loss in step["losses"][:3]]
            beside.append(f"{'resumed' if step['resumed'] else '**not resumed**'}; losses {', '.join(losses)}")
        if "merge" in step:
            beside.append(f"mean KL {step['merge']['kl_mean']:.2g} nats over {step['merge']['tokens']:,} tokens")
        rows.append(Row(f"{shape}: {step['what']}", Figure(step["peak_gib"], " GiB"), "; ".join(beside)))
    how = (
        "`python -m benchmarks.rehearsal`: random weights in the shapes of two models go through the real commands on the CPU, with the recipe "
        f"`{record['recipe']}` and one row of 3,072 tokens an update. Peak memory of all processes together, without mapped files; an estimate "
        "leaves out what the libraries take, which the first row says. Other work ran on the machine, so seconds say little."
    )
    left = record["without_result"]
    return [Subject("Rehearsal at real size", how, rows, [f"No result yet of: {'; '.join(left)}."] if left else [])]


def gpu(record: Record) -> list[Subject]:
    """One table for each GPU."""
    return [one_gpu(name, entry["sections"], entry.get("whole", [])) for name, entry in record.items()]


def one_gpu(name: str, sections: dict[str, Record], whole: Sequence[str]) -> Subject:
    """`whole` names the sections of which every variant ran."""
    limit = sections.get("matrix_products", {}).get("bfloat16", {}).get("tflops")
    rows = [Row("products of large bfloat16 matrices", Figure(limit, " TFLOP/s"), "the limit of what follows")] if limit else []
    trainings = {
        f"{words}, {setup}": entry
        for section, words in (("training", "4 bits"), ("training_16bit", "16 bits"), ("other_attention", "4 bits"))
        for setup, entry in ran(sections, section).items()
    }
    rows += [Row(f"training, {setup}", rate(entry), beside(entry, limit), h200_goal(name, setup)) for setup, entry in trainings.items()]
    if trainings and limit:
        setup, best = max(trainings.items(), key=lambda one: one[1]["tflops"])
        rows.append(Row("share of the limit, at best", Figure(100 * best["tflops"] / limit, " %"), setup, "gpu limit"))
    rows += estimates(sections) + beside_trl(ran(sections, "plain_trl")) + in_deterministic_mode(ran(sections, "deterministic"))
    rows += recipe_of_24_gb(ran(sections, "within_24_gb"))
    for setup, entry in ran(sections, "loading_time").items():
        rows.append(Row(f"base model loaded, {setup}", Figure(entry["seconds"], " s"), "from files in memory"))
    for setup, entry in ran(sections, "answers").items():
        speed = f"{number(entry['tokens_per_second'])} tokens/s, " if "tokens_per_second" in entry else ""
        count = f"{entry['answers']} answers" if "answers" in entry else f"{entry['conversations']} conversations"
        rows.append(Row(f"{count}, {setup}", Figure(entry["seconds"], " s"), f"{speed}{number(entry.get('peak_reserved_gib', 0))} GiB"))
    for optim, same in ran(sections, "resume").items():
        words = ("twice the same bytes", same["twice_the_same"]), ("after a stop the same bytes", same["resumed_the_same"])
        rows.append(Row(f"an eighth of the model, {optim}", "; ".join(f"{what}: {'yes' if yes else '**no**'}" for what, yes in words)))
    how = (
        "`python -m benchmarks.gpu`: random weights in the shape of Llama-3-8B, LoRA of r 16 on all linear layers, rows of 3,072 tokens made of "
        "conversations of 279 on average, trained by the stage's own trainer."
    )
    reasons: dict[str, list[str]] = defaultdict(list)
    for section, figures in sections.items():
        for setup, entry in figures.items():
            if "failed" in entry:
                reasons[entry["failed"].partition(". ")[0].rstrip(".")].append(f"`{section}`: {setup}")
    failed = [f"{'; '.join(setups)} ({reason})" for reason, setups in reasons.items()]
    absent = [f"`{section}`" for section in SECTIONS if section not in sections]
    cut = [f"`{section}`" for section in sections if section not in whole]
    listed = ("Did not run", failed), ("Cut short, so that variants are missing", cut), ("No result of", absent)
    notes = [f"{words}: {'; '.join(names)}." for words, names in listed if names]
    return Subject(f"Training on one {name}", how, rows, notes)


def ran(sections: dict[str, Record], section: str) -> dict[str, Record]:
    """Variants of a section that have a result."""
    return {setup: entry for setup, entry in sections.get(section, {}).items() if "failed" not in entry}


def rate(entry: Record) -> Figure:
    least, most = entry.get("slowest_and_fastest_update", (None, None))
    return Figure(entry["tokens_per_second"], " tokens/s", least, most)


def beside(entry: Record, limit: float | None) -> str:
    share = f"{100 * entry['tflops'] / limit:.0f} % of the limit; " if limit else ""
    return f"{share}peak {number(entry['peak_gib'])} GiB of tensors, {number(entry['peak_reserved_gib'])} from the driver"


def h200_goal(name: str, setup: str) -> str | None:
    """The rates asked for are those of an H200, in 4 bits."""
    if "H200" not in name or not setup.startswith("4 bits, varlen"):
        return None
    return "gpu checkpointing" if ", checkpointing" in setup else "gpu"


def estimates(sections: dict[str, Record]) -> list[Row]:
    """The estimate that is farthest from the measured peak."""
    found = [
        (100 * abs(entry["estimate_to_peak"] - 1), f"{setup}: {number(entry['estimated_gib'])} GiB estimated, {number(entry['peak_gib'])} taken")
        for section in ("training", "training_16bit", "within_24_gb", "other_attention")
        for setup, entry in ran(sections, section).items()
        if "estimate_to_peak" in entry
    ]
    return [Row("memory estimated before a run, at worst", Figure(max(found)[0], " % off"), max(found)[1], "gpu estimate")] if found else []


def beside_trl(found: dict[str, Record]) -> list[Row]:
    plain = found.get("plain TRL")
    return [
        Row(
            f"training, {setup}",
            Figure(entry["times_plain"], " times"),
            f"SFTTrainer with its defaults: {number(plain['tokens_per_second'])} tokens/s against {number(entry['tokens_per_second'])}",
            "gpu plain",
        )
        for setup, entry in found.items()
        if plain and "times_plain" in entry
    ]


def in_deterministic_mode(found: dict[str, Record]) -> list[Row]:
    pairs = [(found[f"deterministic, {number}"], found[f"as they come, {number}"]) for number in (1, 2, 3) if f"as they come, {number}" in found]
    if not pairs:
        return []
    times = [free["tokens_per_second"] / exact["tokens_per_second"] for exact, free in pairs]
    return [Row("time of an update in deterministic mode", Figure.of(times, " times"), "kernels as they come", "gpu deterministic")]


def recipe_of_24_gb(setups: dict[str, Record]) -> list[Row]:
    """22 GiB of the card are free for torch."""
    ours = setups.get("2 rows")
    if not ours or "peak_reserved_gib" not in ours:
        return []
    best = max(setups, key=lambda setup: setups[setup]["tokens_per_second"])
    share = ours["tokens_per_second"] / setups[best]["tokens_per_second"]
    # What a card must have is what torch takes from the driver, which is more than its tensors.
    met = GOALS["gpu 24 GB"].is_met_by(ours["peak_reserved_gib"]) or share >= SHARE_OF_BEST_24_GB
    words = f"its rate is {number(share)} of the best within 22 GiB of this card: {best}, {rate(setups[best])}" if len(setups) > 1 else ""
    return [Row("peak memory of the recipe for a 24 GB card", Figure(ours["peak_reserved_gib"], " GiB"), words, "gpu 24 GB", met)]


SUBJECTS: dict[str, Callable[[Record], list[Subject]]] = {
    "train_cpu": train_cpu,
    "checkpoint_cost": checkpoint_cost,
    "prepare": prepare,
    "generate": generate,
    "repro": repro,
    "startup": startup,
    "rehearsal": rehearsal,
    "gpu": gpu,
}
"""By the name of the results file, in the order of the page."""


def machines(records: dict[str, Record]) -> list[str]:
    """One line for each machine and set of versions."""
    by_machine: dict[str, list[str]] = defaultdict(list)
    for name, record in records.items():
        for machine in [entry["machine"] for entry in record.values()] if name == "gpu" else [record["machine"]]:
            words = [f"{value} GiB" if key == "memory_gib" else f"{value} cores" if key == "cores" else str(value) for key, value in machine.items()]
            described = ", ".join(
                word if key in ("cpu", "cores", "gpu", "memory_gib") else f"{key} {word}"
                for key, word in zip(machine, words, strict=True)
                if word != "None"
            )
            by_machine[described].append(f"[{name}.json](../benchmarks/results/{name}.json)")
    return [f"| {', '.join(names)} | {machine} |" for machine, names in by_machine.items()]


def read(results: Path) -> dict[str, Record]:
    paths = {name: results / f"{name}.json" for name in SUBJECTS}
    records = {name: json.loads(path.read_text(encoding="utf-8")) for name, path in paths.items() if path.exists()}
    # A trial of gpu.py on a CPU, or in its tiny shape, is no figure.
    gpus = {name: entry for name, entry in records.pop("gpu", {}).items() if entry["machine"]["gpu"] and "tiny" not in name}
    return {**records, "gpu": gpus} if gpus else records


def page(results: Path) -> str:
    """The whole of docs/performance.md."""
    records = read(results)
    subjects = [subject for name, record in records.items() for subject in SUBJECTS[name](record)]
    verdicts: dict[str, list[bool]] = defaultdict(list)
    for row in (row for subject in subjects for row in subject.rows):
        if row.goal is not None and row.meets is not None:
            verdicts[row.goal].append(row.meets)
    short = [f"{GOALS[name].what} ({GOALS[name]})" for name, met in verdicts.items() if not all(met)]
    open_goals = [goal for name, goal in GOALS.items() if name not in verdicts]
    lines = [
        "# Performance",
        "",
        "Written by `python -m benchmarks.performance` from [benchmarks/results](../benchmarks/results); `make bench` measures everything again.",
        "",
        f"**{len(verdicts) - len(short)} of {len(verdicts)} measured goals are met; not measured: {len(open_goals)}.**"
        + (f" Falls short: {'; '.join(short)}." if short else ""),
        "",
        "A figure is the median of its rounds, with the least and the most of them in brackets. A ratio is of one round, in which both sides ran one",
        "after the other. The machines are shared and noisy: trust ratios more than seconds, and no difference that is smaller than its spread.",
    ]
    for subject in subjects:
        lines += ["", f"## {subject.title}", "", subject.how, "", "| what | median (spread) | compared with | goal | |", "|---|---|---|---|---|"]
        lines += [
            f"| {row.what} | {row.figure} | {row.beside} | {GOALS[row.goal] if row.goal is not None else ''} | {row.verdict} |"
            for row in subject.rows
        ]
        lines += [line for note in subject.notes for line in ("", note)]
    lines += ["", "## Not measured", "", "What has no result has no number here, estimated or otherwise."]
    for name in SUBJECTS:
        if name not in records:
            sections = f": {', '.join(section.replace('_', ' ') for section in SECTIONS)}" if name == "gpu" else ""
            lines += ["", f"Nothing of benchmarks/{name}.py, for want of a results/{name}.json{sections}."]
    if open_goals:
        lines += ["", "| what | goal | to be measured by |", "|---|---|---|"]
        lines += [f"| {goal.what} | {goal} | {goal.measured_by} |" for goal in open_goals]
    lines += ["", "## Machines", "", "| results | machine and versions |", "|---|---|", *machines(records)]
    return "\n".join(lines) + "\n"


def write() -> None:
    PAGE.write_text(page(RESULTS), encoding="utf-8")


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    write()
