"""Two real processes share the measurement of a test set."""

import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

from qlora import params, test_set
from qlora.base_model import load_model, load_tokenizer
from qlora.chat_template import ChatTemplate
from qlora.conversation import Conversation, Message
from qlora.errors import MachineError
from qlora.ranks import merged
from qlora.test_set import Measured


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
    evaluate = values.evaluate.model_copy(update={"max_new_tokens": 4, "batch_size": 2, "do_sample": True, "temperature": 2.0})
    return test_set.predict(model, template, conversations, evaluate, device, progress=False)


def work(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.save(tuple(measure()), Path(folder) / str(rank))
    dist.destroy_process_group()


def test_two_processes_measure_what_one_measures(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(work, args=(port, str(tmp_path)), nprocs=2)  # type: ignore[no-untyped-call]
    alone: Any = tuple(measure())
    assert torch.load(tmp_path / "0") == torch.load(tmp_path / "1") == alone


def test_an_item_that_is_missing_or_too_many_is_noticed() -> None:
    assert merged({1: "b", 0: "a"}, 2) == ["a", "b"]
    with pytest.raises(MachineError, match=r"\[share-incomplete\] 1 of 3 items are missing or too many, such as number 1"):
        merged({0: "a", 2: "c"}, 3)
    with pytest.raises(MachineError, match="missing or too many, such as number 3"):
        merged({0: "a", 1: "b", 3: "c"}, 2)
