"""Two real processes share the measurement of a test set."""

import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from qlora import params
from qlora.core.conversation import Conversation, Message
from qlora.core.errors import MachineError
from qlora.model.chat_template import ChatTemplate
from qlora.model.config import load_tokenizer
from qlora.model.distributed import all_gather, all_reduce_max, broadcast, gather_items
from qlora.model.loading import load_model
from qlora.prediction import test_set
from qlora.prediction.test_set import Measured
from tests.unit.two_processes import in_two_processes


def measure() -> Measured:
    values = params.load(Path("params.yaml"))
    device = torch.device("cpu")
    folder = Path("models/base/tiny")
    template = ChatTemplate(load_tokenizer(folder), values.chat)
    model = load_model(values.base_model, folder, device, progress=False)
    conversations = [
        Conversation(str(number), "c", [Message(role="user", content=f"{number}+2?" + "?" * number), Message(role="assistant", content=str(number))])
        for number in range(7)
    ]
    predict = values.predict.model_copy(update={"max_new_tokens": 4, "batch_tokens": 70, "do_sample": True, "temperature": 2.0})
    found = test_set.predict(model, template, conversations, predict, device, progress=False)
    assert len(found.batches) > 2, "there is something to share"
    return found


def work(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    torch.save(tuple(measure()), folder / str(rank))


def test_two_processes_measure_what_one_measures(tmp_path: Path) -> None:
    in_two_processes(work, tmp_path)
    alone: Any = tuple(measure())
    assert torch.load(tmp_path / "0") == torch.load(tmp_path / "1") == alone


def wait(rank: int, folder: Path) -> None:
    """The second process has more to do than the group's time limit."""
    dist.destroy_process_group()
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2, timeout=timedelta(seconds=1))
    time.sleep(2.5 * rank)
    (folder / str(rank)).write_text(str([broadcast(rank), all_gather(rank), all_reduce_max(rank), gather_items({rank: "a"}, 2)]))


def test_processes_wait_for_one_that_has_more_to_do(tmp_path: Path) -> None:
    """NCCL's limit of ten minutes ended a baseline whose processes have unequal answers."""
    in_two_processes(wait, tmp_path)
    assert (tmp_path / "0").read_text() == (tmp_path / "1").read_text() == "[0, [0, 1], 1, ['a', 'a']]"


def test_an_item_that_is_missing_or_too_many_is_noticed() -> None:
    assert gather_items({1: "b", 0: "a"}, 2) == ["a", "b"]
    with pytest.raises(MachineError, match=r"\[share-incomplete\] 1 of 3 items are missing or too many, such as number 1"):
        gather_items({0: "a", 2: "c"}, 3)
    with pytest.raises(MachineError, match="missing or too many, such as number 3"):
        gather_items({0: "a", 1: "b", 3: "c"}, 2)
