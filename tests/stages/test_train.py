"""What the stage trains on, made from raw rows; whole trainings are in tests/pipeline."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qlora import params
from qlora.core.conversation import Conversation
from qlora.core.files import read_jsonl
from qlora.data.readers import BATCH_ROWS
from qlora.model.chat_template import ChatTemplate
from qlora.model.config import load_tokenizer
from qlora.params.data import DataParams
from qlora.training.tokenization import encode_split
from qlora.training.trainer import rows_of
from stages.prepare import prepare


@pytest.fixture
def template() -> ChatTemplate:
    return ChatTemplate(load_tokenizer(Path("models/base/tiny")), params.load(Path("params.yaml")).chat)


@pytest.mark.parametrize("packing", ["bfd", "none"])
def test_rows_are_the_same_whatever_the_number_of_processes(tmp_path: Path, template: ChatTemplate, packing: str) -> None:
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"What is {number} + 1?" + " please" * (number % 23)},
                {"role": "assistant", "content": str(number + 1)},
            ]
        }
        for number in range(3 * BATCH_ROWS)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    values = params.load(Path("params.yaml"))
    path = str(tmp_path / "rows.parquet")
    data = DataParams(**values.data.model_dump() | {"train_file": path, "test_file": path, "test_fraction": 0.1})
    sequence = values.sequence.model_copy(update={"packing": packing})

    def made(num_workers: int) -> list[dict[str, Any]]:
        changed = values.model_copy(update={"data": data, "runtime": values.runtime.model_copy(update={"num_workers": num_workers})})
        prepare(changed, prepared=tmp_path, report=tmp_path / "prepare.json", notes=tmp_path / "notes")
        conversations = map(Conversation.from_record, read_jsonl(tmp_path / "train.jsonl"))
        return list(rows_of(encode_split(conversations, template, sequence, "train").examples, sequence))

    first = made(1)
    assert len(first) > 100
    assert made(2) == first
    assert made(4) == first
