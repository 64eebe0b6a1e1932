"""What do checkpoints cost? The default's training with some of them and with none, in turn.

    python -m benchmarks.checkpoint_cost [--rounds 5] [--steps 100] [--checkpoints 5]     writes results/checkpoint_cost.json

Each training is a process of its own and reports the seconds of its updates, and those of them in which it wrote checkpoints; a ratio is of one
round. Where two trainings without any differ by more than a checkpoint costs, only the share spent on writing says something.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.machine import describe_machine

RESULTS = Path(__file__).parent / "results" / "checkpoint_cost.json"
TRAIN = Path("data/prepared/train.jsonl")


def one(steps: int, checkpoints: int) -> None:
    """Print the seconds of a training and the checkpoints that it wrote."""
    import torch
    from peft import get_peft_model
    from transformers import set_seed

    from qlora import params
    from qlora.core.conversation import read_conversations
    from qlora.model import device, loading
    from qlora.model.chat_template import ChatTemplate
    from qlora.model.config import load_tokenizer
    from qlora.runtime.signals import Interruption
    from qlora.training.checkpoints import Checkpoints
    from qlora.training.lora import lora_config
    from qlora.training.tokenization import encode_split
    from qlora.training.trainer import make_trainer

    values = params.load(Path("params.yaml"))
    # None after the last update.
    runtime = values.runtime.model_copy(
        update={"save_steps": math.ceil(steps / (checkpoints + 1)) if checkpoints else steps, "save_minutes": None, "progress": False}
    )
    values = values.model_copy(update={"runtime": runtime, "train": values.train.model_copy(update={"max_steps": steps, "eval_strategy": "no"})})
    device.set_up_device(values.hardware, deterministic=values.train.deterministic)
    folder = Path("models/base") / values.base_model.name
    template = ChatTemplate(load_tokenizer(folder), values.chat)
    examples = encode_split(read_conversations(TRAIN), template, values.sequence, "train").examples
    base = loading.load_model(values.base_model, folder, torch.device("cpu"), progress=False)
    set_seed(values.train.seed)
    model = get_peft_model(base, lora_config(values.lora, base))
    written, spent = 0, 0.0
    with tempfile.TemporaryDirectory(dir=".dvc/tmp") as name, Checkpoints(Path(name) / "run") as kept:
        trainer = make_trainer(values, model, template.tokenizer, examples, [], kept, Interruption())
        save = trainer._save_checkpoint

        def timed(model: Any, trial: Any) -> None:
            nonlocal written, spent
            began = time.perf_counter()
            save(model, trial)
            spent += time.perf_counter() - began
            written += 1

        trainer._save_checkpoint = timed  # type: ignore[method-assign]
        began = time.perf_counter()
        trainer.train()
        print(json.dumps({"seconds": time.perf_counter() - began, "checkpoints": written, "writing": spent}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--checkpoints", type=int, default=5)
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one is not None:
        one(arguments.steps, arguments.one)
        return
    seconds: dict[int, list[float]] = {0: [], arguments.checkpoints: []}
    shares = []
    for number in range(arguments.rounds):
        # The first of a round takes turns too.
        for checkpoints in sorted(seconds, reverse=bool(number % 2)):
            command = [sys.executable, "-m", "benchmarks.checkpoint_cost", "--steps", str(arguments.steps), "--one", str(checkpoints)]
            found = json.loads(
                subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True).stdout.splitlines()[-1]
            )
            assert found["checkpoints"] == checkpoints, found
            seconds[checkpoints].append(found["seconds"])
            if checkpoints:
                shares.append(found["writing"] / (found["seconds"] - found["writing"]))
    ratios = [some / none for some, none in zip(seconds[arguments.checkpoints], seconds[0], strict=True)]
    record = {
        "machine": describe_machine(),
        "steps": arguments.steps,
        "checkpoints": arguments.checkpoints,
        "seconds_without": [round(value, 3) for value in seconds[0]],
        "seconds_with": [round(value, 3) for value in seconds[arguments.checkpoints]],
        "writing_share_median": round(statistics.median(shares), 4),
        "writing_shares": [round(share, 4) for share in shares],
        "ratio_median": round(statistics.median(ratios), 4),
        "ratios": [round(ratio, 4) for ratio in ratios],
    }
    RESULTS.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
