"""Parts of benchmarks.rehearsal that need a model, each a process of its own whose memory is measured.

    python -m benchmarks.rehearsal_parts imports
    python -m benchmarks.rehearsal_parts weights --shape SHAPE --out DIR --tokenizer DIR    random weights, a shard at a time
    python -m benchmarks.rehearsal_parts load --name NAME --bits 4                          as the stages load a base model
    python -m benchmarks.rehearsal_parts merge --name NAME --out DIR                        a random adapter, merged and written as tools.merge does
    python -m benchmarks.rehearsal_parts estimates --small NAME --large NAME                bytes by step, as JSON

All but the first two read the params.yaml of the folder they run in.
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

SHARD_BYTES = 2 * 10**9
DEVIATION = 0.02
"""Of the random weights: what Llama begins a training with."""
LLAMA3: dict[str, Any] = {
    "vocab_size": 128_256,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 8192,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0},
    "bos_token_id": 128_000,
    "eos_token_id": 128_009,
    "tie_word_embeddings": False,
}
LLAMA32 = {
    **LLAMA3,
    "max_position_embeddings": 131_072,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
    },
    "tie_word_embeddings": True,
}
TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
SHAPES: dict[str, dict[str, Any]] = {
    "llama3.2-1b": {**LLAMA32, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16},
    "llama3-8b": {**LLAMA3, "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32},
    "tiny, tied": {**LLAMA32, **TINY},
    "tiny": {**LLAMA3, **TINY},
}


def weights(shape: str, out: Path, tokenizer: Path) -> None:
    """A model's folder; config.json, written last, says that the folder is whole."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    if (out / "config.json").exists():
        return
    shutil.copytree(tokenizer, out, dirs_exist_ok=True, copy_function=shutil.copyfile)
    out.chmod(0o755)
    config = AutoConfig.for_model("llama", **SHAPES[shape], dtype="bfloat16", architectures=["LlamaForCausalLM"])
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    shards: list[dict[str, Any]] = [{}]
    for name, weight in model.named_parameters():
        if shards[-1] and sum(2 * other.numel() for other in shards[-1].values()) + 2 * weight.numel() > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = weight
    generator = torch.Generator().manual_seed(0)
    places = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        made = {
            name: torch.empty(weight.shape, dtype=torch.bfloat16).normal_(0, DEVIATION, generator=generator)
            if weight.ndim == 2
            else torch.ones(weight.shape, dtype=torch.bfloat16)
            for name, weight in shard.items()
        }
        save_file(made, out / file, metadata={"format": "pt"})
        places |= dict.fromkeys(shard, file)
    size = sum(2 * weight.numel() for weight in model.parameters())
    (out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": places}), encoding="utf-8")
    model.generation_config.save_pretrained(out)
    config.save_pretrained(out)


def of_base(name: str, **changes: Any) -> Any:
    """params.yaml with another base model in place."""
    from qlora import params

    values = params.load(Path("params.yaml"))
    return values.model_copy(update={"base_model": values.base_model.model_copy(update={"name": name, **changes})})


def load(name: str, bits: int) -> None:
    import torch

    from qlora.model.loading import load_model

    values = of_base(name, load_in_4bit=bits == 4)
    model = load_model(values.base_model, Path("models/base") / name, torch.device("cpu"), progress=False)
    print(f"{sum(weight.nbytes for weight in model.parameters()) / 2**30:.2f} GiB of weights")


def random_adapter(values: Any, base: Path, out: Path) -> None:
    """An adapter's folder with random weights, made without the base model's."""
    import torch
    from peft import get_peft_model, get_peft_model_state_dict
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    from qlora.model import adapter
    from qlora.model.config import load_config, load_tokenizer
    from qlora.training.lora import lora_config

    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(load_config(base), dtype=torch.bfloat16)
        model = get_peft_model(model, lora_config(values.lora, model))
    generator = torch.Generator().manual_seed(1)
    shapes = {name: weight.shape for name, weight in get_peft_model_state_dict(model, save_embedding_layers=False).items()}
    model.peft_config["default"].save_pretrained(out)
    save_file({name: 0.01 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}, out / adapter.WEIGHTS, {"format": "pt"})
    config = json.loads((out / adapter.CONFIG).read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = f"models/base/{values.base_model.name}"
    (out / adapter.CONFIG).write_text(json.dumps(config), encoding="utf-8")
    load_tokenizer(base).save_pretrained(out)


def merge(name: str, out: Path) -> None:
    """The merged model is removed once its files were hashed."""
    from qlora.delivery import merge as merging
    from qlora.model.base import open_base_model

    values = of_base(name)
    base = open_base_model(values, Path("models/base"))
    with tempfile.TemporaryDirectory(dir=out) as folder:
        adapter, merged = Path(folder, "adapter"), Path(folder, "merged")
        random_adapter(values, base.folder, adapter)
        merging.require_room(base.folder, merged, "bfloat16")
        model = merging.merged_model(values, base.folder, adapter, "bfloat16")
        merging.write(model, base.template, values, adapter, merged)
        del model
        print(f"{sum(entry['bytes'] for entry in merging.files_of(merged).values()) / 1e9:.2f} GB written and hashed")


def estimates(small: str, large: str) -> dict[str, int]:
    """Bytes by step: what tools.preflight says, and what qlora/delivery/merge.py says of itself."""
    from qlora.model.config import load_config
    from qlora.training.memory import FLOAT, estimate

    def merging(name: str) -> int:
        values, config = of_base(name, load_in_4bit=False), load_config(Path("models/base") / name)
        layer = int(config.hidden_size * config.intermediate_size)
        return estimate(values, config).weights + 3 * FLOAT * layer

    configs = {name: load_config(Path("models/base") / name) for name in (small, large)}
    training = estimate(of_base(small), configs[small]).total
    return {
        "train, killed": training,
        "train, resumed": training,
        "merge": merging(small),
        "large: load in 16 bits": estimate(of_base(large, load_in_4bit=False), configs[large]).weights,
        "large: load in 4 bits": estimate(of_base(large), configs[large]).weights,
        "large: merge": merging(large),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["imports", "weights", "load", "merge", "estimates"])
    parser.add_argument("--shape", choices=SHAPES)
    for name in ("--out", "--tokenizer"):
        parser.add_argument(name, type=Path)
    for name in ("--name", "--small", "--large"):
        parser.add_argument(name)
    parser.add_argument("--bits", type=int, choices=(4, 16))
    given = parser.parse_args()
    if given.part == "imports":
        import bitsandbytes  # noqa: F401
        import trl  # noqa: F401

        from qlora.training import trainer  # noqa: F401
    elif given.part == "weights":
        weights(given.shape, given.out, given.tokenizer)
    elif given.part == "load":
        load(given.name, given.bits)
    elif given.part == "merge":
        merge(given.name, given.out)
    else:
        print(json.dumps(estimates(given.small, given.large)))


if __name__ == "__main__":
    main()
