"""Turn raw chat rows into train, validation and test conversations.

reads   data.train_file and data.test_file: rows of data.format
writes  prepared/{train,validation,test}.jsonl: one conversation a line; report: counts by split and reason
params  data
"""

import argparse
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import orjson
from tqdm import tqdm

from qlora import command, environment, params
from qlora.conversation import Conversation, invalid_reason
from qlora.errors import InputError
from qlora.formats import FORMATS
from qlora.params.data import DataParams
from qlora.raw_rows import read_rows
from qlora.records import atomic_writers, json_document, json_line
from qlora.splits import SPLITS, content_hash, split_of


class SplitCount:
    """What became of the rows of one split."""

    def __init__(self) -> None:
        self.rows_in = 0
        self.rows_out = 0
        self.turns = 0
        self.characters = 0
        self.longest = 0
        self.dropped: Counter[str] = Counter()

    def add(self, conversation: Conversation) -> None:
        length = sum(len(message["content"]) for message in conversation.messages)
        self.rows_out += 1
        self.turns += sum(1 for _ in conversation.assistant_turns())
        self.characters += length
        self.longest = max(self.longest, length)

    def record(self) -> dict[str, Any]:
        return {
            "rows_in": self.rows_in,
            "rows_out": self.rows_out,
            "dropped": dict(self.dropped),
            "assistant_turns": self.turns,
            "characters": {"total": self.characters, "max": self.longest, "mean": round(self.characters / max(self.rows_out, 1), 3)},
        }


def prepare(data: DataParams, *, prepared: Path, report: Path, progress: bool) -> None:
    """Stream both raw files once; nothing is written unless every split is good.

    Raises:
        InputError: a file can't be read, a row is refused by data.on_invalid, or a split is left without conversations.
    """
    counts = {split: SplitCount() for split in SPLITS}
    with atomic_writers([*(prepared / f"{split}.jsonl" for split in SPLITS), report]) as (*files, report_file):
        outputs = dict(zip(SPLITS, files, strict=True))
        test_fraction = data.test_fraction if data.carves_test else 0.0
        for place, conversation in conversations(Path(data.train_file), data, progress):
            split = split_of(conversation.id, validation=data.validation_fraction, test=test_fraction)
            keep(place, conversation, data, counts[split], outputs[split])
        if not data.carves_test:
            for place, conversation in conversations(Path(data.test_file), data, progress):
                keep(place, conversation, data, counts["test"], outputs["test"])
        for split, count in counts.items():
            if count.rows_out == 0 and not (split == "validation" and data.validation_fraction == 0):
                raise InputError(
                    "data-no-rows",
                    f"the {split} split has no usable conversation ({count.rows_in} rows in, dropped: {dict(count.dropped)}): "
                    "check data.format, the files, and the fractions of data",
                )
        report_file.write(json_document({split: count.record() for split, count in counts.items()}))


def conversations(path: Path, data: DataParams, progress: bool) -> Iterator[tuple[str, Conversation]]:
    """Every row as a conversation, valid or not, with its place for messages; its id is a hash of what is said in it.

    Raises:
        InputError: a row is not of data.format.
    """
    data_format = FORMATS[data.format]
    rows = read_rows(path, data_format.columns, optional=("category",))
    bar = tqdm(rows, desc=path.name, unit=" rows", disable=None if progress else True, delay=1)
    for number, row in enumerate(bar, start=1):
        place = f"{path}: row {number}"
        try:
            messages = data_format.to_messages(row)
        except ValueError as error:
            raise InputError("data-types", f"{place}: {error}. Mend the row or choose the data.format that fits") from None
        category = row.get("category")
        yield place, Conversation(content_hash(orjson.dumps(messages))[:16], "all" if category is None else str(category), messages)


def keep(place: str, conversation: Conversation, data: DataParams, count: SplitCount, output: BinaryIO) -> None:
    """Write the conversation with the system message, or count why it can't be trained on."""
    count.rows_in += 1
    reason = invalid_reason(conversation.messages)
    if reason is None:
        whole = conversation.with_system_message(data.system_message)
        count.add(whole)
        output.write(json_line(whole.record()))
    elif data.on_invalid == "drop":
        count.dropped[reason] += 1
    else:
        roles = [message["role"] for message in conversation.messages]
        raise InputError("data-invalid", f"{place}: {reason}, roles {roles}. Mend the row or set data.on_invalid to drop")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prepared", type=Path, required=True)
    parser.add_argument("--report", type=Path, required=True)
    arguments = parser.parse_args()
    values = params.load(Path("params.yaml"))
    environment.require_pinned_versions(Path("requirements.txt"), allow_other=values.runtime.allow_other_versions)
    prepare(values.data, prepared=arguments.prepared, report=arguments.report, progress=values.runtime.progress)


if __name__ == "__main__":
    command.run(main)
