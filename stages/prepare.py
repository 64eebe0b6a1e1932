"""Turn raw chat rows into train, validation and test conversations.

reads   data.train_file and data.test_file: rows of data.format
writes  prepared/{train,validation,test}.jsonl: one conversation a line; report: counts by split and reason;
        made_by: Python, packages and processor
params  data
"""

import argparse
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from pathlib import Path

from qlora import command, environment, params
from qlora.cleaning import Cleaned, SplitCount, clean
from qlora.errors import InputError
from qlora.gates import Gates
from qlora.parallel import Engine, local_engine
from qlora.params.data import DataParams
from qlora.params.runtime import RuntimeParams
from qlora.provenance import note_environment
from qlora.ray_engine import ray_engine
from qlora.records import atomic_writers, json_document
from qlora.splits import SPLITS


def prepare(data: DataParams, runtime: RuntimeParams, *, prepared: Path, report: Path) -> None:
    """Stream both raw files once, test first; nothing is written unless every split is good.

    Raises:
        InputError: a file can't be read, a row is refused by data.on_invalid or on_duplicate, test rows leak into train, or a
            split is left without conversations.
        MachineError: a process ended in the middle of its work, or Ray is asked for and is not there.
    """
    counts = {split: SplitCount() for split in SPLITS}
    gates = Gates(data)
    written = [*(prepared / f"{split}.jsonl" for split in SPLITS), report]
    with _engine(runtime) as engine, atomic_writers(written) as (*files, report_file):
        outputs = dict(zip(SPLITS, files, strict=True))
        for is_test in (False,) if data.carves_test else (True, False):
            path = Path(data.test_file if is_test else data.train_file)
            batches = clean(path, data, is_test=is_test, engine=engine)
            for cleaned in _with_bar(batches, path.name, progress=runtime.progress):
                gates.apply(cleaned)
                for split, part in cleaned.parts.items():
                    counts[split].add(part)
                    outputs[split].write(part.lines)
        _require_rows(counts, data)
        gates.require_no_leakage()
        gates.require_no_near_duplicates(outputs)
        report_file.write(json_document({**{split: count.record() for split, count in counts.items()}, **gates.record()}))


def _engine(runtime: RuntimeParams) -> AbstractContextManager[Engine]:
    return ray_engine(runtime.num_workers) if runtime.engine == "ray" else nullcontext(local_engine(runtime.num_workers))


def _with_bar(batches: Iterator[Cleaned], name: str, *, progress: bool) -> Iterator[Cleaned]:
    """The batches, and how many rows went by."""
    first = next(batches, None)
    from tqdm import tqdm  # noqa: PLC0415 - a tenth of a second, in which the processes that make the batches work already

    with tqdm(desc=name, unit=" rows", disable=None if progress else True, delay=1) as bar:
        for batch in chain([first] if first else [], batches):
            bar.update(sum(part.rows_in for part in batch.parts.values()))
            yield batch


def _require_rows(counts: dict[str, SplitCount], data: DataParams) -> None:
    for split, count in counts.items():
        if count.rows_out == 0 and not (split == "validation" and data.validation_fraction == 0):
            raise InputError(
                "data-no-rows",
                f"the {split} split has no usable conversation ({count.rows_in} rows in, dropped: {dict(count.dropped)}): "
                "check data.format, the files, and the fractions of data",
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prepared", type=Path, required=True)
    parser.add_argument("--report", type=Path, required=True)
    parser.add_argument("--made-by", type=Path, required=True)
    arguments = parser.parse_args()
    environment.limit_memory()
    values = params.load(Path("params.yaml"))
    environment.require_pinned_versions(Path("requirements.txt"), allow_other=values.runtime.allow_other_versions)
    prepare(values.data, values.runtime, prepared=arguments.prepared, report=arguments.report)
    note_environment(arguments.made_by, "prepare")


if __name__ == "__main__":
    command.run(main)
