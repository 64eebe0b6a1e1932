"""How much faster are answers in batches? The embedded base model answers prompts of the test set by the same code, in batches and one by one.

    python -m benchmarks.generate [--rounds 5] [--prompts 96]

The sizes take turns within a round; a ratio is of one round. Writes results/generate.json.
"""

import argparse
import json
import statistics
import time
from collections import defaultdict
from itertools import islice
from pathlib import Path

import torch

from benchmarks.machine import describe_machine
from qlora import params
from qlora.core.conversation import Conversation
from qlora.core.files import read_jsonl
from qlora.model import device, loading
from qlora.model.chat_template import ChatTemplate
from qlora.model.config import load_tokenizer
from qlora.prediction.generation import batches_of, generate

RESULTS = Path(__file__).parent / "results" / "generate.json"
TEST = Path("data/prepared/test.jsonl")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=96)
    arguments = parser.parse_args()
    values = params.load(Path("params.yaml"))
    device.set_up_device(values.hardware, deterministic=False)
    folder = Path("models/base") / values.base_model.name
    template = ChatTemplate(load_tokenizer(folder), values.chat)
    model = loading.load_model(values.base_model, folder, torch.device("cpu"), progress=False).eval()
    prompts = []
    for record in read_jsonl(TEST)[: arguments.prompts]:
        answers = template.encode(Conversation.from_record(record)).answers()
        prompts += [row.ids[: span[0]] for row, span in islice(answers, 1)]
    order = [number for (number,) in batches_of(prompts, 1, values.predict.max_new_tokens)]
    stops = loading.stop_token_ids(model, template.tokenizer, template.stop_ids)
    rates: dict[int, list[float]] = defaultdict(list)
    for _ in range(arguments.rounds):
        texts = []
        for size in (1, 8, 32):
            # Of so many rows whatever their length: a budget of tokens would put more of the short ones into a batch.
            batches = {start // size: order[start : start + size] for start in range(0, len(order), size)}
            began = time.perf_counter()
            made = generate(
                model,
                template.tokenizer,
                prompts,
                batches,
                values.predict,
                seed=0,
                stop_ids=stops,
                context=512,
                content_of=template.content_of,
                done=lambda _: None,
            )
            rates[size].append(len(prompts) / (time.perf_counter() - began))
            texts.append({number: answer.text for number, answer in made.items()})
        assert all(text == texts[0] for text in texts), "the answers depend on the batch"
    record = {
        "machine": describe_machine(),
        "model": values.base_model.name,
        "prompts": len(prompts),
        "answers_per_second": {str(size): [round(rate, 2) for rate in found] for size, found in rates.items()},
        "times_one_by_one": {
            str(size): round(statistics.median(rate / one for rate, one in zip(found, rates[1], strict=True)), 2) for size, found in rates.items()
        },
    }
    RESULTS.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
