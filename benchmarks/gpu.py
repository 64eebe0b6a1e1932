"""How fast is Llama-3-8B with LoRA on this GPU, and what does each setting cost? One file that needs no download and nothing of this project.

    python benchmarks/gpu.py [--only SECTION] [--results FILE] [--list]

Random weights in the exact shape of Llama-3-8B, LoRA of rank 16 on all linear layers with float32 adapters, rows of 3,072 tokens. Needs torch and
transformers; peft and bitsandbytes for most sections, trl and flash-attn for some: what is missing is said and left out. Each section is a
process of its own and adds to the results file, so a run may be stopped and gone on with. `--shape tiny` tries the program on any machine.
"""

import argparse
import contextlib
import gc
import importlib.metadata
import importlib.util
import io
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "gpu.json"
SECTION_SECONDS = 540
TOKENS = 3072
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3-8b": {
        "vocab_size": 128_256,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
    },
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
    },
}
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RANK = 16
LOSS_TOKENS = 1024
"""Tokens whose logits are held at once: those of a whole row would take 1.6 GB in float32."""


def have(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


class Bench:
    """One section's device, shape and results."""

    def __init__(self, shape: str, steps: int) -> None:
        import torch

        self.torch = torch
        self.cuda = torch.cuda.is_available()
        self.device = torch.device("cuda" if self.cuda else "cpu")
        self.shape = SHAPES[shape]
        self.tiny = shape == "tiny"
        self.tokens = 128 if self.tiny else TOKENS
        self.steps = steps
        torch.manual_seed(0)

    # Models

    def base(self, *, four_bit: bool, attention: str = "sdpa", layers: int | None = None) -> Any:
        """Frozen random weights in bfloat16, or in 4 bits (NF4, double quantisation)."""
        from transformers import LlamaConfig, LlamaForCausalLM

        torch = self.torch
        shape = {**self.shape, **({"num_hidden_layers": layers} if layers else {})}
        config = LlamaConfig(**shape, rope_theta=500_000.0, tie_word_embeddings=False, attn_implementation=attention)
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            with self.device:
                model = LlamaForCausalLM(config)
        finally:
            torch.set_default_dtype(before)
        if four_bit:
            self._quantise(model)
        model.requires_grad_(False)
        return model

    def _quantise(self, model: Any) -> None:
        import bitsandbytes as bnb

        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                if name in LINEAR:
                    new = bnb.nn.Linear4bit(
                        child.in_features,
                        child.out_features,
                        bias=False,
                        compute_dtype=self.torch.bfloat16,
                        compress_statistics=True,
                        quant_type="nf4",
                    )
                    new.weight = bnb.nn.Params4bit(child.weight.data, requires_grad=False, compress_statistics=True, quant_type="nf4")
                    setattr(parent, name, new.to(self.device))
        for module in model.modules():
            # On some CPUs the first forward pass in eval mode repacks the weights, and they have no gradient from then on.
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
        model.is_loaded_in_4bit = True

    def adapted(self, base: Any) -> Any:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=2 * RANK, lora_dropout=0.0, target_modules=list(LINEAR)))
        for weight in model.parameters():
            if weight.requires_grad:
                weight.data = weight.data.float()
        return model

    def optimizer(self, model: Any) -> Any:
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        return self.torch.optim.AdamW(weights, lr=1e-4, fused=self.cuda)

    # Work

    def checkpointing(self, model: Any, *, on: bool) -> None:
        if on:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()

    def loss(self, model: Any, ids: Any, transformer: Any = None) -> Any:
        """Mean nats of each next token, the logits in chunks that the backward pass makes again."""
        torch = self.torch
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        hidden = (transformer or inner.model)(input_ids=ids, use_cache=False)[0][:, :-1].flatten(0, 1)
        labels = ids[:, 1:].flatten()

        def chunk(states: Any, wanted: Any) -> Any:
            return torch.nn.functional.cross_entropy(inner.lm_head(states).float(), wanted, reduction="sum")

        total = sum(
            torch.utils.checkpoint.checkpoint(chunk, hidden[start : start + LOSS_TOKENS], labels[start : start + LOSS_TOKENS], use_reentrant=False)
            for start in range(0, len(labels), LOSS_TOKENS)
        )
        return total / len(labels)

    def rows(self, count: int) -> Any:
        return self.torch.randint(0, self.shape["vocab_size"], (count, self.tokens), device=self.device)

    def step(self, model: Any, optimizer: Any, ids: Any, transformer: Any = None) -> float:
        loss = self.loss(model, ids, transformer)
        loss.backward()
        self.torch.nn.utils.clip_grad_norm_([weight for group in optimizer.param_groups for weight in group["params"]], 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    def timed(self, work: Callable[[], Any], count: int, warm_up: int = 2) -> list[float]:
        """Seconds of each call."""
        seconds = []
        for number in range(warm_up + count):
            self.wait()
            began = time.perf_counter()
            work()
            self.wait()
            if number >= warm_up:
                seconds.append(time.perf_counter() - began)
        return seconds

    def wait(self) -> None:
        if self.cuda:
            self.torch.cuda.synchronize()

    def train(self, model: Any, rows: int, transformer: Any = None) -> dict[str, Any]:
        """Tokens a second and peak memory of updates."""
        optimizer = self.optimizer(model)
        ids = self.rows(rows)
        self.reset_peak()
        seconds = self.timed(lambda: self.step(model, optimizer, ids, transformer), self.steps)
        median = statistics.median(seconds)
        return {
            "tokens_per_second": round(ids.numel() / median, 1),
            "tokens_per_second_spread": [round(ids.numel() / most, 1) for most in (max(seconds), min(seconds))],
            "updates": self.steps,
            "seconds_per_update": round(median, 4),
            **self.peak(),
        }

    # Memory

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

    @contextlib.contextmanager
    def memory_named(self, entry: dict[str, Any]) -> Iterator[None]:
        """A set-up that does not fit, or that this device does not know, is a result, not an end."""
        try:
            yield
        except self.torch.cuda.OutOfMemoryError:
            entry["failed"] = "out of memory"
        except NotImplementedError as error:
            entry["failed"] = str(error)[:200]
        self.reset_peak()

    # Arithmetic

    def flops_per_token(self, *, checkpointing: bool) -> float:
        """Of one training token, frozen linear layers and attention over rows of documents of `tokens` tokens.

        Forward: 2 per weight and 2 x 2 x tokens/2 x hidden per layer for causal attention. Backward through frozen weights: once more for the
        gradients of activations; attention's twice. Adapters are under 1 %. Activation checkpointing: one more forward pass of the layers.
        """
        hidden, inner, layers = (self.shape[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers"))
        narrow = hidden // self.shape["num_attention_heads"] * self.shape["num_key_value_heads"]
        linear = 2 * (2 * hidden * hidden + 2 * hidden * narrow + 3 * hidden * inner) * layers
        attention = 2 * self.tokens * hidden * layers
        head = 2 * hidden * self.shape["vocab_size"]
        # The chunked loss computes the head twice forward and once backward.
        return 2 * linear + 3 * attention + 3 * head + (linear + attention if checkpointing else 0)


def matrix_products(bench: Bench) -> dict[str, Any]:
    """The measured ceiling: products of large bfloat16 matrices."""
    size = 512 if bench.tiny else 8192
    a, b = (bench.torch.randn(size, size, dtype=bench.torch.bfloat16, device=bench.device) for _ in range(2))
    seconds = statistics.median(bench.timed(lambda: a @ b, 20, warm_up=5))
    return {"size": size, "tflops": round(2 * size**3 / seconds / 1e12, 1)}


def attentions() -> list[str]:
    return ["sdpa", *(["flash_attention_2"] if have("flash_attn") else []), "flex_attention"]


def training(bench: Bench, *, four_bit: bool) -> dict[str, Any]:
    """Activation checkpointing on and off, 1, 2 and 4 rows, every kind of attention that is here."""
    found: dict[str, Any] = {}
    for attention in attentions():
        for checkpointing in (True, False):
            try:
                model = bench.adapted(bench.base(four_bit=four_bit, attention=attention))
                bench.checkpointing(model, on=checkpointing)
            except (ImportError, ValueError) as error:
                found[attention] = {"failed": str(error)[:200]}
                break
            for rows in (1, 2, 4):
                entry: dict[str, Any] = {}
                found[f"{attention}, {'checkpointing' if checkpointing else 'none recomputed'}, {rows} rows"] = entry
                with bench.memory_named(entry):
                    entry |= bench.train(model, rows)
                    entry["tflops"] = round(entry["tokens_per_second"] * bench.flops_per_token(checkpointing=checkpointing) / 1e12, 1)
                if "failed" in entry:
                    break
            del model
            bench.reset_peak()
    return found


def deterministic(bench: Bench) -> dict[str, Any]:
    """The same set-up with kernels whose result depends on timing refused, and as they come, in turn."""
    model = bench.adapted(bench.base(four_bit=True))
    bench.checkpointing(model, on=True)
    found: dict[str, Any] = {"deterministic": [], "as they come": []}
    for _ in range(3):
        for name in found:
            bench.torch.use_deterministic_algorithms(name == "deterministic")
            with contextlib.suppress(AttributeError):
                bench.torch.utils.deterministic.fill_uninitialized_memory = False
            found[name].append(bench.train(model, 1)["tokens_per_second"])
    slower = statistics.median(fast / slow for slow, fast in zip(found["deterministic"], found["as they come"], strict=True)) - 1
    return {**found, "slower": round(slower, 4)}


def compiled(bench: Bench) -> dict[str, Any]:
    """torch.compile of the transformer's layers, beside the same without."""
    model = bench.adapted(bench.base(four_bit=True))
    bench.checkpointing(model, on=False)
    found = {"as it is": bench.train(model, 1)}
    inner = model.get_base_model().model
    for layer in inner.layers:
        layer.compile()
    began = time.perf_counter()
    found["compiled"] = bench.train(model, 1)
    found["compiled"]["seconds_with_compiling"] = round(time.perf_counter() - began, 1)
    return found


def plain_trl(bench: Bench) -> dict[str, Any]:
    """SFTTrainer with its defaults on rows of the same length, beside this script's loop with activation checkpointing."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rows = bench.torch.randint(0, bench.shape["vocab_size"], (2 + 2 * bench.steps, bench.tokens)).tolist()
    model = bench.adapted(bench.base(four_bit=True))
    bench.checkpointing(model, on=True)
    ours = bench.train(model, 1)
    del model
    bench.reset_peak()
    model = bench.adapted(bench.base(four_bit=True))
    wanted = {
        "output_dir": "/tmp/plain-trl",
        "per_device_train_batch_size": 1,
        "max_length": bench.tokens,
        "max_steps": 2 + bench.steps,
        "bf16": bench.cuda,
        "use_cpu": not bench.cuda,
        "report_to": "none",
        "save_strategy": "no",
        "dataset_kwargs": {"skip_prepare_dataset": True},
    }
    data = Dataset.from_dict({"input_ids": rows, "labels": rows})

    trainer = SFTTrainer(model=model, args=SFTConfig(**wanted), train_dataset=data, processing_class=empty_tokenizer())
    seconds: list[float] = []
    step = trainer.training_step

    def timed(*args: Any, **kwargs: Any) -> Any:
        bench.wait()
        seconds.append(time.perf_counter())
        return step(*args, **kwargs)

    trainer.training_step = timed
    bench.reset_peak()
    trainer.train()
    spans = [after - before for before, after in itertools.pairwise(seconds[2:])]
    plain = {"tokens_per_second": round(bench.tokens / statistics.median(spans), 1), **bench.peak()}
    return {"plain": plain, "ours, checkpointing, 1 row": ours, "times_plain": round(ours["tokens_per_second"] / plain["tokens_per_second"], 2)}


def empty_tokenizer() -> Any:
    """As much of a tokenizer as TRL asks for when the rows are token ids already."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({"[UNK]": 0, "[PAD]": 1, "[EOS]": 2}, unk_token="[UNK]"))
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]", pad_token="[PAD]", eos_token="[EOS]")


def within_24_gb(bench: Bench) -> dict[str, Any]:
    """The set-up of a 24 GB card, 22 GiB of which are free for torch: which rows fit, and how fast."""
    if bench.cuda:
        share = 22 * 2**30 / bench.torch.cuda.get_device_properties(0).total_memory
        bench.torch.cuda.set_per_process_memory_fraction(min(1.0, share))
    found: dict[str, Any] = {}
    for checkpointing in (True, False):
        entry: dict[str, Any] = {}
        with bench.memory_named(entry):
            model = bench.adapted(bench.base(four_bit=True, layers=None))
            bench.checkpointing(model, on=checkpointing)
            for rows in (1, 2, 4):
                entry = {}
                found[f"{'checkpointing' if checkpointing else 'none recomputed'}, {rows} rows"] = entry
                with bench.memory_named(entry):
                    entry |= bench.train(model, rows)
                if "failed" in entry:
                    break
            del model
        if "failed" in entry:
            found.setdefault(f"{'checkpointing' if checkpointing else 'none recomputed'}, 1 rows", entry)
        bench.reset_peak()
    return found


def generation(bench: Bench) -> dict[str, Any]:
    """Greedy answers of 128 tokens to prompts of 256, the base in 4 and in 16 bits with the adapter."""
    found: dict[str, Any] = {}
    length, new = (16, 8) if bench.tiny else (256, 128)
    for four_bit in (True, False):
        model = bench.adapted(bench.base(four_bit=four_bit)).eval()
        for size in (1, 8, 32, 64):
            ids = bench.torch.randint(0, bench.shape["vocab_size"], (size, length), device=bench.device)
            entry: dict[str, Any] = {}
            found[f"{4 if four_bit else 16}-bit, batch {size}"] = entry
            with bench.memory_named(entry), bench.torch.no_grad():

                def answer(ids: Any = ids, model: Any = model) -> Any:
                    mask = bench.torch.ones_like(ids)
                    return model.generate(input_ids=ids, attention_mask=mask, do_sample=False, min_new_tokens=new, max_new_tokens=new, pad_token_id=0)

                bench.reset_peak()
                seconds = statistics.median(bench.timed(answer, 2, warm_up=1))
                entry |= {"tokens_per_second": round(size * new / seconds, 1), **bench.peak()}
        del model
        bench.reset_peak()
    return found


def resume(bench: Bench) -> dict[str, Any]:
    """Deterministic mode: twice the same, and stopped in the middle with adapter, optimizer and random state saved; four layers are enough."""
    torch = bench.torch
    torch.use_deterministic_algorithms(mode=True)

    def trained(stop: int | None) -> list[Any]:
        torch.manual_seed(0)
        model = bench.adapted(bench.base(four_bit=True, layers=4 if not bench.tiny else 2))
        bench.checkpointing(model, on=True)
        optimizer = bench.optimizer(model)
        generator = torch.Generator().manual_seed(1)
        batches = [torch.randint(0, bench.shape["vocab_size"], (1, bench.tokens), generator=generator).to(bench.device) for _ in range(6)]
        for number, ids in enumerate(batches):
            if number == stop:
                learned = {name: weight.detach().cpu().clone() for name, weight in model.named_parameters() if weight.requires_grad}
                file = io.BytesIO()
                torch.save(optimizer.state_dict(), file)
                file.seek(0)
                with torch.no_grad():
                    for name, weight in model.named_parameters():
                        if weight.requires_grad:
                            weight.zero_()
                            weight.copy_(learned[name])
                optimizer = bench.optimizer(model)
                optimizer.load_state_dict(torch.load(file, weights_only=True))
            bench.step(model, optimizer, ids)
        return [weight.detach().cpu() for weight in model.parameters() if weight.requires_grad]

    whole, again, stopped = trained(None), trained(None), trained(3)
    return {
        "twice the same": all(bool(torch.equal(a, b)) for a, b in zip(whole, again, strict=True)),
        "resumed the same": all(bool(torch.equal(a, b)) for a, b in zip(whole, stopped, strict=True)),
    }


SECTIONS: dict[str, tuple[Callable[[Bench], dict[str, Any]], tuple[str, ...]]] = {
    "matrix_products": (matrix_products, ()),
    "training_4bit": (lambda bench: training(bench, four_bit=True), ("peft", "bitsandbytes")),
    "training_16bit": (lambda bench: training(bench, four_bit=False), ("peft",)),
    "deterministic": (deterministic, ("peft", "bitsandbytes")),
    "compiled": (compiled, ("peft", "bitsandbytes")),
    "plain_trl": (plain_trl, ("peft", "bitsandbytes", "trl", "datasets")),
    "within_24_gb": (within_24_gb, ("peft", "bitsandbytes")),
    "generation": (generation, ("peft", "bitsandbytes")),
    "resume": (resume, ("peft", "bitsandbytes")),
}
"""In the order of their worth, each with the packages that it needs."""


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


def add(path: Path, section: str, found: dict[str, Any], *, tiny: bool) -> None:
    """Results of several runs and machines stand in one file, by the name of the GPU; a trial in the tiny shape stands by itself."""
    record = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    here = machine()
    entry = record.setdefault((here["gpu"] or "cpu") + (", tiny" if tiny else ""), {})
    entry["machine"] = here
    entry.setdefault("sections", {})[section] = found
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(SECTIONS), help="one section, in this process")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--shape", choices=list(SHAPES), default="llama-3-8b")
    parser.add_argument("--steps", type=int, default=5, help="timed updates of each set-up")
    parser.add_argument("--list", action="store_true", help="the sections")
    arguments = parser.parse_args()
    if arguments.list:
        print("\n".join(SECTIONS))
        return
    if arguments.only is None:
        failed = []
        for section in SECTIONS:
            command = [sys.executable, __file__, "--only", section, "--results", str(arguments.results), "--shape", arguments.shape]
            began = time.monotonic()
            try:
                status: int | str = subprocess.run([*command, "--steps", str(arguments.steps)], timeout=SECTION_SECONDS, check=False).returncode
            except subprocess.TimeoutExpired:
                status = "stopped after its time"
            print(f"{section}: {time.monotonic() - began:.0f} s" + (f", {status}" if status else ""), flush=True)
            failed += [section] if status else []
        if failed:
            sys.exit(f"failed: {', '.join(failed)}")
        return
    # Read by cuBLAS and flash attention when they begin.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("FLASH_ATTENTION_DETERMINISTIC", "1" if arguments.only in ("deterministic", "resume") else "0")
    work, needed = SECTIONS[arguments.only]
    missing = [name for name in needed if not have(name)]
    if missing:
        found: dict[str, Any] = {"left out": f"{', '.join(missing)} not installed"}
    else:
        bench = Bench(arguments.shape, arguments.steps)
        if not bench.cuda and not bench.tiny:
            sys.exit("torch sees no GPU here; `--shape tiny` tries the program itself")
        found = work(bench)
    add(arguments.results, arguments.only, found, tiny=arguments.shape == "tiny")
    print(json.dumps({arguments.only: found}, indent=2), flush=True)


if __name__ == "__main__":
    main()
