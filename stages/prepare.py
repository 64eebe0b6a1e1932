"""Turn raw chat rows into train, validation and test conversations.

reads   data.train_file and data.test_file: rows of data.format
writes  prepared/{train,validation,test}.jsonl: one conversation a line; report: counts by split and reason
params  data
"""

import logging
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from pathlib import Path

from qlora.core import environment
from qlora.core.errors import InputError
from qlora.core.files import atomic_writers, json_document
from qlora.core.text import visible
from qlora.data.checks import Checks
from qlora.data.cleaning import NOT_DRAWN, Cleaned, FileCount, SplitCount, clean, require_known_weights
from qlora.data.ray_workers import ray_engine
from qlora.data.splits import SPLITS
from qlora.data.workers import Engine, local_engine
from qlora.params import Params
from qlora.params.data import DataParams
from qlora.params.runtime import RuntimeParams
from qlora.runtime import command, progress
from qlora.runtime.provenance import record_environment

FEW_CONVERSATIONS = 30
MANY_DROPPED = 0.1
logger = logging.getLogger("qlora.prepare")


def prepare(values: Params, *, prepared: Path, report: Path, notes: Path) -> None:
    """Stream both raw files once, test first; nothing is written unless every split is good.

    Raises:
        InputError: a file can't be read, a row is refused by data.on_invalid or on_duplicate, test rows leak into train, or a
            split is left without conversations.
        MachineError: a process ended in the middle of its work, or Ray is asked for and is not there.
    """
    data, runtime = values.data, values.runtime
    counts = {split: SplitCount() for split in SPLITS}
    files_read: defaultdict[Path, FileCount] = defaultdict(FileCount)
    ignored: Counter[str] = Counter()
    checks = Checks(data)
    require_known_weights(data)
    written = [*(prepared / f"{split}.jsonl" for split in SPLITS), report]
    with _engine(runtime) as engine, atomic_writers(written) as (*files, report_file):
        outputs = dict(zip(SPLITS, files, strict=True))
        for is_test in (False,) if data.carves_test else (True, False):
            path = Path(data.test_file if is_test else data.train_file)
            batches = clean(path, data, is_test=is_test, engine=engine)
            for cleaned in _with_bar(batches, path.name, enabled=runtime.progress):
                checks.apply(cleaned)
                files_read[cleaned.path].add(cleaned.parts)
                ignored.update(cleaned.ignored)
                for split, part in cleaned.parts.items():
                    counts[split].add(part)
                    outputs[split].write(part.lines)
                    outputs[split].write(part.repeated())
        _tell(files_read, ignored, counts)
        _require_rows(counts, data)
        checks.require_no_leakage()
        checks.require_no_near_duplicates(outputs)
        drawn = [row for split, count in counts.items() for row in count.outcomes(split)]
        record = {split: count.record() for split, count in counts.items()} | checks.record()
        by_file = {str(path): count.record() for path, count in files_read.items()}
        report_file.write(json_document({**record, "files": by_file, "ignored": dict(ignored), "plot": drawn}))
    record_environment(notes, "prepare")


def _engine(runtime: RuntimeParams) -> AbstractContextManager[Engine]:
    return ray_engine(runtime.num_workers) if runtime.engine == "ray" else nullcontext(local_engine(runtime.num_workers))


def _with_bar(batches: Iterator[Cleaned], name: str, *, enabled: bool) -> Iterator[Cleaned]:
    """The batches, and how many rows went by."""
    # The processes that make the batches start first: the bar's library takes a tenth of a second to import.
    first = next(batches, None)
    with progress.bar(name, unit="rows", enabled=enabled) as bar:
        for batch in chain([first] if first else [], batches):
            bar.update(sum(part.rows_in for part in batch.parts.values()))
            yield batch


def _tell(files: Mapping[Path, FileCount], ignored: Mapping[str, int], counts: Mapping[str, SplitCount]) -> None:
    """What was read, what was dropped and what was not looked at, and a warning where that is much."""
    for path, count in files.items():
        logger.info("%s", visible(f"{path}: {count.told()}"))
    for name, rows in ignored.items():
        logger.warning("%s", visible(f"{name} is not read ({rows:,} times): take it out if it changes nothing, see docs/data.md"))
    for split, part in counts.items():
        dropped = part.rows_in - part.rows_out - part.dropped[NOT_DRAWN]
        if part.rows_in and dropped > part.rows_in * MANY_DROPPED:
            logger.warning("%s of %s rows of the %s split were dropped", f"{dropped:,}", f"{part.rows_in:,}", split)
        if 0 < part.rows_out < FEW_CONVERSATIONS:
            logger.warning("the %s split has %d conversations: numbers of so few decide little", split, part.rows_out)


def _require_rows(counts: dict[str, SplitCount], data: DataParams) -> None:
    for split, count in counts.items():
        if count.rows_out == 0 and not (split == "validation" and data.validation_fraction == 0):
            raise InputError(
                "data-no-rows",
                f"the {split} split has no usable conversation ({count.rows_in} rows in, dropped: {dict(count.dropped)}): "
                "check data.format, the files, and the fractions of data",
            )


def main() -> None:
    environment.limit_memory()
    values, paths = command.stage_inputs(prepare, __doc__)
    prepare(values, **paths)


if __name__ == "__main__":
    command.run(main)
