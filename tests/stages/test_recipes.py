"""Every recipe: its accumulation, its memory against its card, and two updates with a tiny model of the same family."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from benchmarks.recipes import PAGE, needs, page
from qlora import params
from qlora.core.files import write_json, write_jsonl
from qlora.model.manifest import make_manifest
from stages.train import train
from tests.conftest import REAL as REAL_DATA
from tests.families import stand_in, stock
from tests.unit.trainings import changed
from tools import preflight, recipes

GPU = [name for name in recipes.names() if name != "tiny-cpu"]
SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
ROWS = [
    {
        "id": str(number),
        "category": "c",
        "messages": [
            {"role": "user", "content": f"What is {number} + 1?"},
            {"role": "assistant", "content": str(number + 1)},
            {"role": "user", "content": "And one more?"},
            {"role": "assistant", "content": str(number + 2)},
        ],
    }
    for number in range(200)
]


def test_there_are_nine_beside_the_default() -> None:
    assert len(GPU) == 9


@pytest.mark.parametrize("name", GPU)
def test_it_fits_the_card_it_is_made_for(name: str) -> None:
    values = preflight.of_recipe(name)
    rows = values.hardware.per_device_train_batch_size * values.hardware.num_processes * values.gradient_accumulation_steps
    assert rows == values.train.batch_size
    gigabytes = min(int(number) for number in re.findall(r"(\d+)(?: to \d+)? GB", recipes.summary(recipes.path_of(name))))
    needed = needs(name)
    # What torch's allocator leaves between tensors is not in the estimate.
    assert needed.total < 0.95 * gigabytes * 10**9


def test_the_order_in_which_recipes_were_used_is_nowhere() -> None:
    """Each sets all that any other does."""
    keys = {name: {(section, key) for section, key, _ in recipes.values_of(recipes.path_of(name))} for name in GPU}
    for name, own in keys.items():
        assert own == set().union(*keys.values()), name


TEMPLATES = {"llama3.1-8b": "llama3_1", "llama3-": "llama3", "qwen2.5": "qwen2_5", "qwen3": "qwen3"}
"""The stock template of each family, by the beginning of a model's name."""
REAL = {"llama3-8b-rtx4090": "llama3_tokenizer", "qwen3-8b-rtx4090": "tokenizers/qwen3"}
"""Recipes that are tried with their real tokenizer, where it is at hand. It takes a while: the others of a family have a stand-in."""


def family(recipe: str, name: str, folder: Path) -> str:
    """A pinned random model of the recipe's kind with the template of its family, and its real tokenizer where that is there; the template's name."""
    kind = json.loads((preflight.SHAPES / f"{name}.json").read_text(encoding="utf-8"))["model_type"]
    template = next(found for beginning, found in TEMPLATES.items() if name.startswith(beginning))
    real = REAL_DATA / REAL.get(recipe, "none")
    tokenizer: Any = AutoTokenizer.from_pretrained(real) if real.is_dir() else stand_in(template, stock()[template])
    tokenizer.chat_template = stock()[template]
    config = AutoConfig.for_model(kind, **SMALL, vocab_size=len(tokenizer), max_position_embeddings=4096, tie_word_embeddings=False, head_dim=16)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)
    tokenizer.save_pretrained(folder / name)
    write_json(folder / f"{name}.json", make_manifest(folder / name).record())
    return template


@pytest.mark.parametrize("name", GPU)
def test_it_trains(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = changed(
        preflight.of_recipe(name),
        # Of what it asks for only the GPUs are not there; several processes and shared layers have tests of their own.
        hardware__device="cpu",
        hardware__num_processes=1,
        hardware__strategy="ddp",
        hardware__num_threads=2,
        base_model__attn_implementation="sdpa",
        train__batch_size=preflight.of_recipe(name).train.batch_size // preflight.of_recipe(name).hardware.num_processes,
        train__max_steps=2,
        train__logging_steps=1,
        sequence__max_length=192,
        runtime__progress=False,
    )
    manifests = tmp_path / "models" / "base"
    template = family(name, values.base_model.name, manifests)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    for split, rows in (("train", ROWS), ("validation", ROWS[:5])):
        write_jsonl(tmp_path / split, rows)
    outputs = {key: tmp_path / key for key in ("adapter_folder", "report", "metrics", "notes")}
    train(values, train=tmp_path / "train", validation=tmp_path / "validation", manifests=manifests, **outputs)
    report = json.loads(outputs["report"].read_text(encoding="utf-8"))
    assert report["steps"] == 2
    # Qwen 3 shows the last answer otherwise than those before it.
    assert report["train"]["conversations"]["one_by_one"] == (len(ROWS) if template == "qwen3" else 0)
    assert report["train"]["end_of_turn_per_answer"] == 1.0
    assert (outputs["adapter_folder"] / "adapter_model.safetensors").is_file()


def test_a_recipes_params_are_those_that_use_would_write(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text(recipes.compose(Path("params.yaml"), recipes.path_of("llama3-8b-ddp")), encoding="utf-8")
    assert params.load(tmp_path / "params.yaml") == preflight.of_recipe("llama3-8b-ddp")


def test_the_documents_table_is_made_of_the_recipes(tmp_path: Path) -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert text == page(text), "run `python -m benchmarks.recipes`"
    assert page(text, tmp_path / "none.json").count("not measured") == len(GPU)
    results = tmp_path / "gpu.json"
    setup = {"varlen, checkpointing, 2 rows": {"tokens_per_second": 2500.4, "peak_gib": 8.1}}
    results.write_text(json.dumps({"RTX 4090": {"sections": {"training": setup}}}), encoding="utf-8")
    lines = [line for line in page(text, results).splitlines() if "2,500 tokens/s, 8.1 GiB on RTX 4090" in line]
    assert [line.split("`")[1] for line in lines] == ["llama3-8b-rtx4090"]
