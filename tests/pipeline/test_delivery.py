"""Merging, chatting and serving, in a clone in which the micro pipeline ran."""

import hashlib
import json
import os
import pty
import select
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from qlora.core.errors import InputError, MachineError
from tests.pipeline.clone import Clone
from tools import chat, merge

CONVERTER = """
import pathlib, sys
model, _, target, _, kind = sys.argv[1:]
if "broken" in __file__:
    sys.exit("this architecture is not known")
weights = (pathlib.Path(model) / "model.safetensors").read_bytes()
pathlib.Path(target).write_text(f"{kind} {len(weights)}")
"""


def call(tool: Any, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["tool", *arguments])
    tool.main()


def tuned() -> dict[tuple[str, int], str]:
    rows = [json.loads(line) for line in Path("data/predictions/tuned.jsonl").read_text(encoding="utf-8").splitlines()]
    return {(row["id"], row["turn"]): row["answer"] for row in rows}


def prepared_rows() -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path("data/prepared/test.jsonl").read_text(encoding="utf-8").splitlines()]


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_merged_model_is_the_adapter_and_continues_the_chain_of_hashes(
    inside: Clone, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    call(merge, monkeypatch, "--dtype", "float32")
    assert "greedy answers the same     100.00% of 8" in capsys.readouterr().out
    numbers: Any = inside.json("metrics/merge.json")
    assert 0 <= numbers["kl_mean"] <= numbers["kl_max"] <= 1e-6
    assert (numbers["argmax_agreement"], numbers["answers_equal"], numbers["template_equal"], numbers["accepted"]) == (1, 1, 1, True)
    assert numbers["nll_adapter"] == pytest.approx(inside.json("metrics/evaluate.json")["nll"], rel=1e-6)
    made: Any = inside.json("models/merged/merge.json")
    assert made["adapter"]["dvc_md5"] in Path("dvc.lock").read_text(encoding="utf-8")
    for name, digest in made["adapter"]["sha256"].items():
        assert sha256(Path("models/adapter") / name) == digest
    assert made["base_model"]["manifest_sha256"] == sha256(Path("models/base/tiny.json"))
    there = {path.name for path in Path("models/merged").iterdir()} - {"merge.json"}
    assert there == set(made["files"]) >= {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"}
    for name, entry in made["files"].items():
        path = Path("models/merged") / name
        assert (entry["sha256"], entry["bytes"]) == (sha256(path), path.stat().st_size)
    assert "Data and pipelines are up to date" in inside.run("dvc", "status")
    assert inside.run("git", "status", "--porcelain") == "?? metrics/merge.json\n"
    # Whoever may read this folder may read all that the pipeline and the merge wrote.
    Path("new").touch()
    written = [path for folder in ("models", "reports", "metrics", "data") for path in Path(folder).rglob("*") if path.is_file()]
    assert len(written) > 20
    assert [path for path in written if (path.stat().st_mode ^ Path("new").stat().st_mode) & 0o044] == []


def test_a_model_too_far_from_the_adapter_leaves_the_one_before_in_place(
    inside: Clone, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder, broken = tmp_path / "llama.cpp", tmp_path / "broken.py"
    folder.mkdir()
    for path in (folder / "convert_hf_to_gguf.py", broken):
        path.write_text(CONVERTER, encoding="utf-8")
    few = ("--num-examples", "2")
    call(merge, monkeypatch, "--gguf", str(folder), *few)
    before = {path: path.read_bytes() for path in Path("models/merged").iterdir()}
    weights = Path("models/merged/model.safetensors").stat().st_size
    assert Path("models/merged/model.gguf").read_text(encoding="utf-8") == f"bf16 {weights}"
    record: Any = inside.json("models/merged/merge.json")
    assert record["files"]["model.gguf"]["sha256"] == sha256(Path("models/merged/model.gguf"))

    with pytest.raises(SystemExit) as ended:
        call(merge, monkeypatch, "--max-kl", "0", *few)
    assert ended.value.code == 4
    assert "not put in place: a mean KL of" in capsys.readouterr().err
    refused: Any = inside.json("metrics/merge.json")
    assert refused["accepted"] is False
    assert refused["kl_mean"] > 0
    assert {path: path.read_bytes() for path in Path("models/merged").iterdir()} == before
    assert Path("models/merged.pending/merge.json").is_file()
    call(merge, monkeypatch, "--compare", *few)
    assert not Path("models/merged.pending").exists()
    assert inside.json("metrics/merge.json")["kl_mean"] == refused["kl_mean"], "the same models, compared again"
    with pytest.raises(MachineError, match=r"(?s)\[gguf-failed\].*this architecture is not known"):
        call(merge, monkeypatch, "--compare", "--gguf", str(broken), *few)
    own = {path.name: path.read_bytes() for path in Path("models/merged").iterdir() if path.name != "merge.json"}
    assert own == {path.name: content for path, content in before.items() if path.name not in ("merge.json", "model.gguf")}
    assert [path.name for path in Path("models").iterdir() if "partial" in path.name] == []


def test_what_does_not_belong_together_is_not_merged(inside: Clone, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(code: str, *arguments: str, error: type[Exception] = InputError) -> None:
        with pytest.raises(error, match=rf"\[{code}\]"):
            call(merge, monkeypatch, *arguments)
        assert not Path("models/merged").exists() or not (Path("models/merged") / "merge.json").exists()

    monkeypatch.delenv("LLAMA_CPP", raising=False)
    refused("gguf-converter", "--gguf", error=MachineError)
    Path("mine").mkdir()
    Path("mine/model.safetensors").write_text("of somebody else", encoding="utf-8")
    refused("occupied", "--out", "mine")
    assert Path("mine/model.safetensors").read_text(encoding="utf-8") == "of somebody else"
    inside.set(base_model__bnb_4bit_quant_type="fp4")
    refused("merge-stale")
    inside.set(base_model__bnb_4bit_quant_type="nf4", base_model__load_in_4bit=True)
    refused("merge-max-kl")
    refused("merge-stale", "--max-kl", "1")
    inside.set(base_model__load_in_4bit=False)
    manifest = Path("models/base/tiny.json")
    content = manifest.read_bytes()
    manifest.write_bytes(content + b"\n")
    refused("merge-stale")
    manifest.write_bytes(content)
    config = Path("models/adapter/adapter_config.json")
    config.chmod(0o644)
    config.write_bytes(config.read_bytes() + b"\n")
    refused("input-changed")
    with pytest.raises(InputError, match=r"\[input-changed\]"):
        call(chat, monkeypatch, "--prompt", "2+2?")
    Path("dvc.lock").unlink()
    refused("merge-unrecorded")


def test_chat_gives_the_answers_of_the_evaluation(inside: Clone, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from qlora import params

    answers, conversations = tuned(), prepared_rows()
    loaded = chat.load(params.load(Path("params.yaml")), base_only=False, sample=False, max_new_tokens=None)
    asked = 0
    for conversation in conversations:
        for turn, place in enumerate(place for place, message in enumerate(conversation["messages"]) if message["role"] == "assistant"):
            assert loaded.answer(conversation["messages"][:place]).text == answers[conversation["id"], turn]
            asked += 1
    assert asked == len(answers)

    call(chat, monkeypatch, "--prompt", conversations[0]["messages"][1]["content"])
    assert capsys.readouterr().out == answers[conversations[0]["id"], 0] + "\n", "nothing but the answer"
    with pytest.raises(InputError, match=r"\[chat-control-token\]"):
        call(chat, monkeypatch, "--prompt", "2+2?<|eot_id|>")
    call(chat, monkeypatch, "--from-test", "3", "--seed", "5", "--compare")
    shown = capsys.readouterr().out
    call(chat, monkeypatch, "--from-test", "3", "--seed", "5", "--compare")
    assert capsys.readouterr().out == shown
    for block in shown.split("── ")[1:]:
        conversation = next(row for row in conversations if block.startswith(row["id"]))
        *_, query, original = (message["content"] for message in conversation["messages"])
        assert f"query: {query}\noriginal answer: {original}\nbase answer: " in block
        assert f"\ntuned answer: {list(answers[key] for key in answers if key[0] == conversation['id'])[-1]}" in block
    assert shown.count("── ") == 3


@contextmanager
def in_terminal(clone: Clone, *arguments: str) -> Iterator[tuple["subprocess.Popen[bytes]", Callable[..., str]]]:
    """A process whose standard streams are a terminal, and a function that types and waits for a text."""
    leader, follower = pty.openpty()
    command = [sys.executable, "-m", "tools.chat", *arguments]
    process = subprocess.Popen(
        command, cwd=clone.path, env=clone.environment, stdin=follower, stdout=follower, stderr=follower, start_new_session=True
    )
    os.close(follower)
    seen = b""

    def talk(typed: str, expected: str, *, interrupt: bool = False) -> str:
        nonlocal seen
        os.write(leader, typed.encode())
        end = time.monotonic() + 180
        while expected.encode() not in seen:
            assert time.monotonic() < end, seen
            # Between the prompt and the wait for input a signal is only noted: a person would press Ctrl-C again.
            if interrupt:
                os.kill(process.pid, signal.SIGINT)
            if select.select([leader], [], [], 2)[0]:
                seen += os.read(leader, 1000)
        before, _, seen = seen.partition(expected.encode())
        return before.decode()

    try:
        yield process, talk
    finally:
        process.kill()
        process.wait()
        os.close(leader)


def test_a_conversation_in_a_terminal(inside: Clone) -> None:
    question = prepared_rows()[0]["messages"][1]["content"]
    answer = tuned()[prepared_rows()[0]["id"], 0]
    with in_terminal(inside, "--max-new-tokens", "400") as (process, talk):
        talk("", "> ")
        # The micro model rambles on: Ctrl-C ends its answer, and what came of it stays in the history.
        talk(f"{question}\n", f"{question}\r\n{answer[:1]}")
        process.send_signal(signal.SIGINT)
        assert "cut after" not in talk("", "> ")
        talk("", "Ctrl-C ends an answer", interrupt=True)
        talk("\n/reset\n", "> ")
        talk("Forge <|eot_id|> it\n", "[chat-control-token]")
        talk("\x1b[31m" + "very long " * 300 + "\n", "[chat-too-long]")
        talk("/exit\n", "/exit")
        assert process.wait(60) == 0


def free_port() -> int:
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return int(place.getsockname()[1])


@contextmanager
def served(clone: Clone, model: str) -> Iterator[str]:
    """`transformers serve` on the model; yields the address of its API."""
    port = free_port()
    log = clone.path / "serve.log"
    command = ["transformers", "serve", model, "--device", "cpu", "--host", "127.0.0.1", "--port", str(port)]
    with log.open("wb") as file:
        process = subprocess.Popen(command, cwd=clone.path, env=clone.environment, stdout=file, stderr=subprocess.STDOUT)
    try:
        end = time.monotonic() + 240
        while True:
            assert process.poll() is None, log.read_text(encoding="utf-8")
            assert time.monotonic() < end, log.read_text(encoding="utf-8")
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except OSError:
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(60)


def test_the_openai_client_streams_the_answer_of_chat_from_a_served_model(
    inside: Clone, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from openai import OpenAI

    call(merge, monkeypatch, "--dtype", "float32", "--num-examples", "2")
    questions = [row["messages"][1]["content"] for row in prepared_rows()[:3]]
    answers = []
    for question in questions:
        capsys.readouterr()
        call(chat, monkeypatch, "--prompt", question, "--max-new-tokens", "24")
        answers.append(capsys.readouterr().out.removesuffix("\n"))
    assert any(len(answer) > 3 for answer in answers)
    with served(inside, "models/merged") as address, OpenAI(base_url=address, api_key="none") as client:
        for question, answer in zip(questions, answers, strict=True):
            messages: Any = [{"role": "system", "content": "Answer only."}, {"role": "user", "content": question}]
            stream = client.chat.completions.create(model="models/merged", messages=messages, max_tokens=24, stream=True)
            pieces = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
            assert "".join(pieces).strip() == answer
            assert sum(map(bool, pieces)) > 1, "in pieces, as they come"
        whole = client.chat.completions.create(model="models/merged", messages=messages, max_tokens=24)
        assert (whole.choices[0].message.content or "").strip() == answers[-1]
