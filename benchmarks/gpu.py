"""How fast the trainings and answers of this project are on this GPU, and what each setting costs.

    python -m benchmarks.gpu                    every section that the results lack; ends before --minutes are over
    python -m benchmarks.gpu --only training    that section
    python -m benchmarks.gpu --list             the sections
    python -m benchmarks.gpu --shape tiny       tries the program, on a CPU too

Random weights in the exact shape of Llama-3-8B, so nothing is downloaded. What runs is what `train` and `predict` run: the recipe
llama3-8b-rtx4090, read, quantised and adapted by `adapter_model`, trained by `make_trainer`, on rows that `pack` makes of conversations as long as
no_robots' (279 tokens on average). Each section is a process of its own, takes three minutes at most and writes each result when it has it; an error
ends one variant alone.
"""

import argparse
import contextlib
import gc
import importlib.metadata
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "gpu.json"
SECTION_SECONDS = 180
RECIPE = "llama3-8b-rtx4090"
SHAPES: dict[str, dict[str, Any]] = {
    "llama3-8b": {
        "vocab_size": 128_256,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "llama3-8b, eighth": {
        "vocab_size": 128_256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 8,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
}
TOKENIZER = Path(__file__).parents[1] / "models" / "base" / "tiny"
"""Rows are token ids already: any tokenizer serves."""
MEAN_TOKENS, PROMPT_TOKENS = 279, 80
"""Of a conversation of no_robots, and of the part before its answer."""
WARM_UP = 2
TRL_TOKENS = 1024
"""TRL's default max_length."""


class Bench:
    """A device, a shape and a folder for its weights."""

    def __init__(self, shape: str, folder: Path, updates: int = 5) -> None:
        import torch

        self.torch = torch
        self.cuda = torch.cuda.is_available()
        self.shape = shape
        self.tiny = shape == "tiny"
        self.folder = folder / shape.replace(", ", "-")
        self.updates = updates

    # What runs

    def params(self, **values: Any) -> Any:
        """The recipe's, with `section__key=value` in place; `train.batch_size` follows the rows of a pass."""
        from tools.preflight import of_recipe

        params: Any = of_recipe(RECIPE)
        values = {"train__eval_strategy": "no", "train__max_steps": WARM_UP + self.updates, "runtime__progress": False, **values}
        values.setdefault("train__batch_size", max(2, values.get("hardware__per_device_train_batch_size", 1)))
        if self.tiny:
            values.setdefault("sequence__max_length", 512)
        if not self.cuda:
            values |= {"hardware__device": "cpu", "hardware__tf32": False, "hardware__num_threads": os.cpu_count()}
        for name, value in values.items():
            section, _, key = name.partition("__")
            params = params.model_copy(update={section: getattr(params, section).model_copy(update={key: value})})
        return params

    def base(self) -> Path:
        """The folder of the base model, in 16 bits, made at the first call."""
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        if not (self.folder / "done").exists():
            config = AutoConfig.for_model(
                "llama", **SHAPES[self.shape], max_position_embeddings=8192, rms_norm_eps=1e-5, rope_theta=500_000.0, tie_word_embeddings=False
            )
            self.torch.manual_seed(0)
            with self.torch.device("cuda" if self.cuda else "cpu"):
                model = AutoModelForCausalLM.from_config(config, dtype=self.torch.bfloat16)
            model.save_pretrained(self.folder)
            tokenizer: Any = AutoTokenizer.from_pretrained(TOKENIZER)
            tokenizer.save_pretrained(self.folder)
            (self.folder / "done").touch()
            del model
            self.reset_peak()
        return self.folder

    def conversations(self, tokens: int, max_length: int) -> list[Any]:
        """Random conversations of `tokens` tokens together, with lengths as of no_robots; the answer alone is learned."""
        import numpy as np

        from qlora.training.tokenization import Example

        random = np.random.default_rng(0)
        mean, found, total = (MEAN_TOKENS if not self.tiny else 40), [], 0
        while total < tokens:
            # Half of all are shorter than the mean, a few ten times as long.
            length = int(np.clip(random.lognormal(np.log(mean) - 0.32, 0.8), 8, max_length))
            ids = random.integers(0, SHAPES[self.shape]["vocab_size"], length).tolist()
            prompt = min(length // 2, int(random.integers(4, 2 * PROMPT_TOKENS)))
            found.append(Example(ids=ids, labels=[-100] * prompt + ids[prompt:], conversation=str(len(found))))
            total += length
        return found

    def trainer(self, params: Any, checkpoints: Any, examples: list[Any] | None = None) -> Any:
        """What the stage `train` makes."""
        from qlora.model.config import load_tokenizer
        from qlora.model.device import set_up_device
        from qlora.runtime.signals import Interruption
        from qlora.training.lora import adapter_model
        from qlora.training.packing import pack
        from qlora.training.trainer import make_trainer

        if examples is None:
            tokens = params.sequence.max_length * params.train.batch_size * (params.train.max_steps + 1)
            examples = self.conversations(tokens, params.sequence.max_length)
            rows = pack([len(one.ids) for one in examples], params.sequence.max_length)
            # The last row is not full: an update with it would be measured as a slow one.
            full = sorted(place for row in rows for place in row if sum(len(examples[other].ids) for other in row) > 0.9 * params.sequence.max_length)
            examples = [examples[place] for place in full]
        device = set_up_device(params.hardware, deterministic=params.train.deterministic)
        model = adapter_model(params, self.base(), device)
        return make_trainer(params, model, load_tokenizer(self.base()), examples, [], checkpoints, Interruption())

    # Figures

    def timed(self, trainer: Any) -> dict[str, Any]:
        """Tokens a second, without padding, and peak memory of a training's updates, the first ones left out."""
        from transformers import TrainerCallback

        marks: list[tuple[float, int]] = []
        bench = self

        class Marks(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
                bench.wait()
                marks.append((time.perf_counter(), int(state.num_input_tokens_seen)))

        trainer.add_callback(Marks())
        self.reset_peak()
        trainer.train()
        pairs = list(zip(marks[WARM_UP - 1 :], marks[WARM_UP:], strict=False))
        rates = [(new[1] - old[1]) / (new[0] - old[0]) for old, new in pairs]
        seconds, tokens = sum(new[0] - old[0] for old, new in pairs), sum(new[1] - old[1] for old, new in pairs)
        return {
            "tokens_per_second": round(tokens / seconds, 1),
            "slowest_and_fastest_update": [round(min(rates), 1), round(max(rates), 1)],
            "updates": len(pairs),
            "tokens_per_update": round(tokens / len(pairs)),
            **self.peak(),
        }

    def train(self, **values: Any) -> dict[str, Any]:
        """A training by the recipe with these values: its speed, the arithmetic that it reached, and its memory beside the estimate."""
        from qlora.model.config import load_config
        from qlora.training.checkpoints import Checkpoints
        from qlora.training.memory import CONTEXT_BYTES, estimate

        params = self.params(**values)
        with tempfile.TemporaryDirectory() as folder, Checkpoints(Path(folder)) as checkpoints:
            trainer = self.trainer(params, checkpoints)
            found = self.timed(trainer)
        lengths = [len(example.ids) for example in trainer.examples]
        needed = estimate(params, load_config(self.base()), attended=sum(length**2 for length in lengths) / 2 / sum(lengths))
        found["gflop_per_token"] = round(needed.flops_per_token / 1e9, 2)
        found["tflops"] = round(found["tokens_per_second"] * needed.flops_per_token / 1e12, 1)
        found["estimated_gib"] = round((needed.total - (CONTEXT_BYTES if self.cuda else 0)) / 2**30, 2)
        if self.cuda:
            found["estimate_to_peak"] = round(found["estimated_gib"] / found["peak_gib"], 3)
        return found

    def wait(self) -> None:
        if self.cuda:
            self.torch.cuda.synchronize()

    def reset_peak(self) -> None:
        gc.collect()
        if self.cuda:
            self.torch.cuda.empty_cache()
            self.torch.cuda.reset_peak_memory_stats()

    def peak(self) -> dict[str, float]:
        """GiB that tensors took at most, and that torch held from the driver."""
        if not self.cuda:
            return {}
        cuda = self.torch.cuda
        return {"peak_gib": round(cuda.max_memory_allocated() / 2**30, 2), "peak_reserved_gib": round(cuda.max_memory_reserved() / 2**30, 2)}


Results = Iterator[tuple[str, Callable[[], dict[str, Any]]]]
"""Variants of a section by their names; each is run by itself."""


def matrix_products(bench: Bench) -> Results:
    """What the card can do: products of large bfloat16 matrices."""
    torch = bench.torch

    def products() -> dict[str, Any]:
        size = 512 if bench.tiny else 8192
        a, b = (torch.randn(size, size, dtype=torch.bfloat16, device="cuda" if bench.cuda else "cpu") for _ in range(2))
        seconds = []
        for _ in range(25):
            bench.wait()
            began = time.perf_counter()
            a @ b
            bench.wait()
            seconds.append(time.perf_counter() - began)
        return {"size": size, "tflops": round(2 * size**3 / statistics.median(seconds[5:]) / 1e12, 1)}

    yield "bfloat16", products


def training(bench: Bench) -> Results:
    """QLoRA: activation checkpointing and rows per pass, beside masked sdpa."""
    return trainings(
        bench, ("varlen", True, 2), ("varlen", True, 8), ("varlen", False, 2), ("varlen", True, 1), ("varlen", False, 1), ("sdpa", True, 1)
    )


def other_attention(bench: Bench) -> Results:
    """The recipe's training by the other kernels for packed rows, where they are installed."""
    installed = (("flash_attention_2", True, 2),) if importlib.util.find_spec("flash_attn") else ()
    return trainings(bench, *((("flex_attention", True, 2), *installed) if bench.cuda else ()))


def trainings(bench: Bench, *variants: tuple[str, bool, int], four_bit: bool = True) -> Results:
    """By attention, activation checkpointing and rows a pass."""
    for attention, checkpointing, rows in variants:
        values = {
            "base_model__load_in_4bit": four_bit,
            "base_model__attn_implementation": attention,
            "hardware__activation_checkpointing": checkpointing,
            "hardware__per_device_train_batch_size": rows,
        }
        name = f"{attention}, {'checkpointing' if checkpointing else 'none recomputed'}, {rows} row{'s' if rows > 1 else ''}"
        yield name, lambda values=values: bench.train(**values)


def training_16bit(bench: Bench) -> Results:
    """LoRA on the base model in 16 bits."""
    return trainings(bench, ("varlen", False, 2), ("varlen", True, 8), four_bit=False)


def plain_trl(bench: Bench) -> Results:
    """TRL with its defaults and the same LoRA on the same conversations, beside the recipe."""
    found: dict[str, float] = {}

    def plain() -> dict[str, Any]:
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer

        from qlora.model import loading
        from qlora.model.config import load_tokenizer
        from qlora.model.device import set_up_device
        from qlora.training.lora import lora_config

        params = bench.params(base_model__attn_implementation="sdpa", train__deterministic=False)
        device = set_up_device(params.hardware, deterministic=False)
        base = loading.load_model(params.base_model, bench.base(), device, progress=False)
        with tempfile.TemporaryDirectory() as folder:
            args = SFTConfig(
                output_dir=folder,
                max_steps=WARM_UP + bench.updates,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                use_cpu=not bench.cuda,
                include_num_input_tokens_seen="non_padding",
                dataset_kwargs={"skip_prepare_dataset": True},
            )
            longest = 128 if bench.tiny else TRL_TOKENS
            examples = bench.conversations(16 * longest * (WARM_UP + bench.updates), params.sequence.max_length)
            rows = Dataset.from_dict({"input_ids": [one.ids[:longest] for one in examples], "labels": [one.labels[:longest] for one in examples]})
            trainer = SFTTrainer(
                model=base,
                args=args,
                train_dataset=rows,
                processing_class=load_tokenizer(bench.base()),
                peft_config=lora_config(params.lora, base),
            )
            result = bench.timed(trainer)
        found["plain"] = result["tokens_per_second"]
        return {**result, "rows": args.per_device_train_batch_size, "activation_checkpointing": args.gradient_checkpointing}

    def ours() -> dict[str, Any]:
        result = bench.train()
        return {**result, **({"times_plain": round(result["tokens_per_second"] / found["plain"], 2)} if "plain" in found else {})}

    yield "plain TRL", plain
    yield "the recipe", ours


def deterministic(bench: Bench) -> Results:
    """Kernels whose result depends on timing refused, and as they come, in turn."""
    rates: dict[bool, list[float]] = {True: [], False: []}

    def one(kind: bool) -> dict[str, Any]:
        result = bench.train(train__deterministic=kind)
        rates[kind].append(result["tokens_per_second"])
        return result

    for number in (1, 2, 3):
        for kind in (True, False):
            yield f"{'deterministic' if kind else 'as they come'}, {number}", lambda kind=kind: one(kind)
    yield "times the time", lambda: {"median": round(statistics.median(b / a for a, b in zip(rates[True], rates[False], strict=True)), 3)}


def within_24_gb(bench: Bench) -> Results:
    """The recipe as it is on a card of 24 GB, of which torch may take 22 GiB."""
    if bench.cuda:
        bench.torch.cuda.set_per_process_memory_fraction(min(1.0, 22 * 2**30 / bench.torch.cuda.get_device_properties(0).total_memory))
    for rows in (2, 8, 12):
        yield f"{rows} rows", lambda rows=rows: bench.train(hardware__per_device_train_batch_size=rows)


def answers(bench: Bench) -> Results:
    """Greedy answers of 128 tokens without and with a new adapter, 500 of them with it, and the likelihood of 100 references."""
    from peft import get_peft_model

    from qlora.model import loading
    from qlora.model.chat_template import Encoded
    from qlora.model.config import load_tokenizer
    from qlora.model.device import set_up_device
    from qlora.prediction.generation import batches_of, generate
    from qlora.prediction.likelihood import turn_nlls
    from qlora.training.lora import lora_config

    count, new = (12, 8) if bench.tiny else (500, 128)
    examples = bench.conversations(count * 400, 3072)[:count]
    prompts = [[token for token, label in zip(one.ids, one.labels, strict=True) if label == -100] for one in examples]

    def model_of(*, tuned: bool) -> Any:
        params = bench.params()
        device = set_up_device(params.hardware, deterministic=True)
        base = loading.load_model(params.base_model, bench.base(), device, progress=False)
        return (get_peft_model(base, lora_config(params.lora, base)) if tuned else base).eval()

    def answered(rows: int, most: int, *, tuned: bool) -> dict[str, Any]:
        model, tokenizer = model_of(tuned=tuned), load_tokenizer(bench.base())
        # So many of the longest prompts fill a batch; of shorter ones there are more.
        tokens = rows * (max(map(len, prompts[:most])) + new)
        params = bench.params(predict__max_new_tokens=new, predict__batch_tokens=tokens).predict
        batches = dict(enumerate(batches_of(prompts[:most], tokens, new)))
        bench.reset_peak()
        began = time.perf_counter()
        # No token ends an answer of a model that knows nothing.
        made = generate(
            model, tokenizer, prompts, batches, params, seed=0, stop_ids=[], context=8192, content_of=lambda ids: str(len(ids)), done=lambda _: None
        )
        bench.wait()
        seconds = time.perf_counter() - began
        tokens = sum(answer.tokens for answer in made.values())
        return {
            "answers": len(made),
            "batches": len(batches),
            "seconds": round(seconds, 2),
            "tokens_per_second": round(tokens / seconds, 1),
            **bench.peak(),
        }

    def scored(*, tuned: bool) -> dict[str, Any]:
        model = model_of(tuned=tuned)
        device = next(model.parameters()).device
        bench.reset_peak()
        began = time.perf_counter()
        for one in examples[:100]:
            start = next(place for place, label in enumerate(one.labels) if label != -100)
            turn_nlls(model, Encoded(ids=one.ids, spans=[(start, len(one.ids))]), device)
        bench.wait()
        seconds = time.perf_counter() - began
        return {"conversations": len(examples[:100]), "seconds": round(seconds, 2), **bench.peak()}

    for rows, most, tuned in ((16, 16, False), (16, 16, True), (128, 500, True)):
        yield (
            f"{'tuned' if tuned else 'base'}, batches of {rows} and more",
            lambda rows=rows, most=most, tuned=tuned: answered(rows, min(most, count), tuned=tuned),
        )
    yield "likelihoods, tuned", lambda: scored(tuned=True)


def resume(bench: Bench) -> Results:
    """Twice the same bytes, and the same bytes after a stop: an eighth of the model, four updates, stopped after two."""
    small = Bench("tiny" if bench.tiny else "llama3-8b, eighth", bench.folder.parent)
    for optim in ("adamw_torch", "adamw_bnb_8bit", "paged_adamw_32bit", "paged_adamw_8bit"):
        if bench.cuda or optim == "adamw_torch":
            yield optim, lambda optim=optim: same_bytes(small, optim)


def same_bytes(bench: Bench, optim: str, **values: Any) -> dict[str, bool]:
    from qlora.training.checkpoints import Checkpoints

    params = bench.params(train__max_steps=4, runtime__save_steps=2, train__optim=optim, train__deterministic=True, **values)

    def trained(folder: Path, *, again: bool = False) -> dict[str, Any]:
        with Checkpoints(folder) as checkpoints:
            trainer = bench.trainer(params, checkpoints)
            newest = checkpoints.newest() if again else None
            assert bool(newest) == again
            trainer.train(resume_from_checkpoint=str(newest) if newest else None)
        return {name: weight.detach().cpu() for name, weight in trainer.model.named_parameters() if weight.requires_grad}

    with tempfile.TemporaryDirectory() as folder:
        first = trained(Path(folder) / "first")
        again = trained(Path(folder) / "again")
        resumed = trained(Path(folder) / "first", again=True)
    equal = bench.torch.equal
    return {
        "twice_the_same": all(equal(first[name], weight) for name, weight in again.items()),
        "resumed_the_same": all(equal(first[name], weight) for name, weight in resumed.items()),
    }


def loading_time(bench: Bench) -> Results:
    """Of the base model from files in memory, in 4 and in 16 bits."""
    from qlora.model import loading
    from qlora.model.device import set_up_device

    def loaded(four_bit: bool) -> dict[str, Any]:
        params = bench.params(base_model__load_in_4bit=four_bit)
        device = set_up_device(params.hardware, deterministic=True)
        bench.base()
        bench.reset_peak()
        began = time.perf_counter()
        loading.load_model(params.base_model, bench.base(), device, progress=False)
        bench.wait()
        return {"seconds": round(time.perf_counter() - began, 2), **bench.peak()}

    for four_bit in (True, False):
        yield f"{4 if four_bit else 16} bits", lambda four_bit=four_bit: loaded(four_bit)


SECTIONS: dict[str, Callable[[Bench], Results]] = {
    section.__name__: section
    for section in (matrix_products, loading_time, training, plain_trl, deterministic, answers, resume, training_16bit, within_24_gb, other_attention)
}
"""In the order of their worth."""


def machine() -> dict[str, Any]:
    import torch

    versions = {}
    for name in ("torch", "transformers", "peft", "bitsandbytes", "trl", "flash_attn"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    if not torch.cuda.is_available():
        return {"gpu": None, **versions}
    properties = torch.cuda.get_device_properties(0)
    return {"gpu": properties.name, "memory_gib": round(properties.total_memory / 2**30, 1), "cuda": torch.version.cuda, **versions}


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return found


def run_section(name: str, bench: Bench, path: Path) -> None:
    """Write each variant's figures as soon as they are there: by the GPU's name, since results of several machines are in one file."""
    here = machine()
    card = (here["gpu"] or "cpu") + (", tiny" if bench.tiny else "")
    found: dict[str, Any] = {}
    for variant, work in SECTIONS[name](bench):
        began = time.monotonic()
        try:
            found[variant] = work()
        except Exception as error:
            found[variant] = {"failed": f"{type(error).__name__}: {str(error)[:300]}"}
        bench.reset_peak()
        record = read(path)
        entry = record.setdefault(card, {})
        entry["machine"] = here
        entry.setdefault("sections", {})[name] = found
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        print(f"{name}: {variant}: {json.dumps(found[variant])} ({time.monotonic() - began:.0f} s)", flush=True)
    if found:
        record = read(path)
        record[card]["whole"] = sorted({*record[card].get("whole", []), name})
        path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def run_all(arguments: argparse.Namespace) -> None:
    """Each section in a process of its own, those left out of which the results have every variant."""
    end = time.monotonic() + 60 * arguments.minutes
    cards = read(arguments.results)
    done = {name for card, entry in cards.items() if card.endswith(", tiny") == (arguments.shape == "tiny") for name in entry.get("whole", [])}
    failed = []
    for section in SECTIONS:
        if section in done and not arguments.again:
            continue
        left = end - time.monotonic()
        if left < 30:
            print(f"{section} and what follows: no time left; run again for the rest")
            break
        command = [sys.executable, "-m", "benchmarks.gpu", "--only", section, "--shape", arguments.shape, "--updates", str(arguments.updates)]
        try:
            status: int | str = subprocess.run(
                [*command, "--results", str(arguments.results), "--work", str(arguments.work)], timeout=min(SECTION_SECONDS, left), check=False
            ).returncode
        except subprocess.TimeoutExpired:
            status = "stopped after its time"
        failed += [section] if status else []
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), help="these sections, in this process")
    parser.add_argument("--again", action="store_true", help="also the sections that the results have")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--shape", choices=list(SHAPES), default="llama3-8b")
    parser.add_argument("--updates", type=int, default=5, help="timed updates of each training")
    parser.add_argument("--minutes", type=float, default=60, help="begin nothing after them, and stop what runs")
    memory = Path("/dev/shm")
    parser.add_argument("--work", type=Path, default=memory if memory.is_dir() else Path(tempfile.gettempdir()), help="folder for 16 GB of weights")
    parser.add_argument("--list", action="store_true", help="the sections")
    arguments = parser.parse_args()
    if arguments.list:
        print("\n".join(f"{name}: {section.__doc__}" for name, section in SECTIONS.items()))
        return
    if arguments.only is None:
        run_all(arguments)
        return
    bench = Bench(arguments.shape, arguments.work / "benchmarks-gpu", arguments.updates)
    if not bench.cuda and not bench.tiny:
        sys.exit("torch sees no GPU here; `--shape tiny` tries the program itself")
    for section in arguments.only:
        run_section(section, bench, arguments.results)


if __name__ == "__main__":
    main()
