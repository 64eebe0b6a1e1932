"""What does exactness cost a training? Tokens per second of this project's trainer and of a bare SFTTrainer with the same settings, in turn.

    python -m benchmarks.train_cpu [--rounds 7] [--steps 100]     writes results/train_cpu.json
    python -m benchmarks.train_cpu --threads [--rounds 3]         how its threads wait: alone, and beside a busy process; into the same file

Both train the embedded default, each as a process of its own: ours with its checkpoints, signals and its loss of every update, the bare one as
TRL's documentation shows it, on the same token ids packed by TRL, without checkpoints. A ratio is of one round.

Threads that wait for one another spin, by GNU OpenMP's default for as long as it takes, so a busy process beside them costs more than its share.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from benchmarks.machine import describe_machine

RESULTS = Path(__file__).parent / "results" / "train_cpu.json"

SHARED = """
import json, sys, tempfile, time
from pathlib import Path
import torch
from peft import get_peft_model
from transformers import set_seed
from qlora.model.device import set_up_device
from qlora.model.config import load_tokenizer
from qlora.model.loading import load_model
from qlora import params
from qlora.model.chat_template import ChatTemplate
from qlora.core.conversation import Conversation, read_conversations
from qlora.training.tokenization import encode_split
from qlora.core.files import read_jsonl
from qlora.training.lora import lora_config
steps, threads = map(int, sys.argv[1:])
values = params.load(Path("params.yaml"))
values = values.model_copy(update={
    "hardware": values.hardware.model_copy(update={"num_threads": threads or values.hardware.num_threads}),
    "train": values.train.model_copy(update={"max_steps": steps, "eval_strategy": "no"}),
    "runtime": values.runtime.model_copy(update={"progress": False}),
})
folder = Path("models/base") / values.base_model.name
template = ChatTemplate(load_tokenizer(folder), values.chat)
examples = encode_split(read_conversations(Path("data/prepared/train.jsonl")), template, values.sequence, "train").examples
torch.set_num_threads(values.hardware.num_threads)
scratch = tempfile.TemporaryDirectory(dir=".dvc/tmp")
def report(trainer):
    began = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - began
    print(json.dumps({"seconds": seconds, "tokens": int(trainer.state.num_input_tokens_seen)}))
"""

OURS = (
    SHARED
    + """
from qlora.training.checkpoints import Checkpoints
from qlora.runtime.signals import Interruption
from qlora.training.trainer import make_trainer
set_up_device(values.hardware, deterministic=values.train.deterministic)
base = load_model(values.base_model, folder, torch.device("cpu"), progress=False)
set_seed(values.train.seed)
model = get_peft_model(base, lora_config(values.lora, base))
with Checkpoints(Path(scratch.name) / "run") as checkpoints, Interruption() as interruption:
    report(make_trainer(values, model, template.tokenizer, examples, [], checkpoints, interruption))
"""
)

BARE = (
    SHARED
    + """
from datasets import Dataset
from transformers import AutoModelForCausalLM
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer
train, sequence = values.train, values.sequence
rows = Dataset.from_dict({"input_ids": [example.ids for example in examples], "labels": [example.labels for example in examples]})
arguments = SFTConfig(
    output_dir=scratch.name, use_cpu=True, bf16=False, max_steps=steps, per_device_train_batch_size=values.hardware.per_device_train_batch_size,
    gradient_accumulation_steps=values.gradient_accumulation_steps, learning_rate=train.learning_rate, lr_scheduler_type=train.lr_scheduler_type,
    warmup_steps=train.warmup_steps, optim=train.optim, max_grad_norm=train.max_grad_norm, seed=train.seed, logging_steps=train.logging_steps,
    save_strategy="no", report_to="none", disable_tqdm=True, max_length=sequence.max_length, packing=True, activation_checkpointing=False,
    dataloader_pin_memory=False, include_num_input_tokens_seen="all",
)
base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
report(SFTTrainer(
    base, args=arguments, train_dataset=rows, processing_class=template.tokenizer, peft_config=lora_config(values.lora, base),
))
"""
)


WAITING: dict[str, tuple[int, dict[str, str]]] = {
    "as it is": (0, {}),
    "GOMP_SPINCOUNT=0": (0, {"GOMP_SPINCOUNT": "0"}),
    "GOMP_SPINCOUNT=1000": (0, {"GOMP_SPINCOUNT": "1000"}),
    "GOMP_SPINCOUNT=10000": (0, {"GOMP_SPINCOUNT": "10000"}),
    "GOMP_SPINCOUNT=100000": (0, {"GOMP_SPINCOUNT": "100000"}),
    "one thread": (1, {}),
}
"""Number of threads (0: that of params.yaml) and environment."""


def rate(program: str, steps: int, threads: int = 0, environment: Mapping[str, str] | None = None) -> float:
    """Tokens a second of a training in a process of its own."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run(
        [sys.executable, "-c", program, str(steps), str(threads)],
        env={**inherited, **(environment or {})},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    found = json.loads(done.stdout.splitlines()[-1])
    return float(found["tokens"] / found["seconds"])


@contextlib.contextmanager
def busy_process(*, wanted: bool) -> Iterator[None]:
    """Another program that takes a core for itself."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if wanted else None
    try:
        yield
    finally:
        if process:
            process.kill()
            process.wait()


def beside_bare(rounds: int, steps: int) -> dict[str, object]:
    rates: dict[str, list[float]] = {"ours": [], "bare": []}
    for number in range(rounds):
        # The first of a round takes turns too.
        for name, program in sorted({"ours": OURS, "bare": BARE}.items(), reverse=bool(number % 2)):
            rates[name].append(rate(program, steps))
    ratios = [ours / bare for ours, bare in zip(rates["ours"], rates["bare"], strict=True)]
    return {
        "machine": describe_machine(),
        "steps": steps,
        "tokens_per_second": {name: [round(one, 1) for one in found] for name, found in rates.items()},
        "times_bare_median": round(statistics.median(ratios), 4),
        "times_bare": [round(ratio, 4) for ratio in ratios],
        # The noise: how far the bare trainer is from itself.
        "bare_slowest_to_fastest": round(min(rates["bare"]) / max(rates["bare"]), 4),
    }


def ways_of_waiting(rounds: int, steps: int) -> dict[str, object]:
    found: dict[str, dict[str, list[float]]] = {name: {"alone": [], "beside": []} for name in WAITING}
    for _ in range(rounds):
        for name, (threads, environment) in WAITING.items():
            for place, wanted in (("alone", False), ("beside", True)):
                with busy_process(wanted=wanted):
                    found[name][place].append(round(rate(OURS, steps, threads, environment), 1))
    return {"machine": describe_machine(), "steps": steps, "tokens_per_second": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--threads", action="store_true", help="measure ways of waiting in place of the bare trainer")
    arguments = parser.parse_args()
    known = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    if arguments.threads:
        record = known | {"threads": ways_of_waiting(arguments.rounds, arguments.steps)}
    else:
        record = beside_bare(arguments.rounds, arguments.steps) | {name: known[name] for name in ("threads",) if name in known}
    RESULTS.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
