"""The table of docs/recipes.md: what each recipe needs, by estimate, and what was measured on a GPU.

    python -m benchmarks.recipes

Memory is qlora/training/memory.py's estimate. Time is arithmetic alone: a token's operations over half of what the card computes at most,
which packed rows of 3,072 tokens come near to. Measured is what results/gpu.json holds for the recipe's card and set-up, and nothing else.
"""

import json
import re
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from qlora.params import Params
from qlora.training.memory import Estimate, estimate
from tools import preflight, recipes

PAGE = Path("docs/recipes.md")
RESULTS = Path(__file__).parent / "results" / "gpu.json"
BEGIN, END = "<!-- made by `python -m benchmarks.recipes` -->", "<!-- end -->"
ROWS, TOKENS_PER_ROW = 10_000, 279
"""Like no_robots under Llama 3's tokenizer."""
SHARE = 0.5


class Card(NamedTuple):
    name: str
    memory_gb: int
    tflops: float
    """Dense bfloat16 products at most: the maker's figure."""


RTX_4080, RTX_4090, A100 = Card("RTX 4080", 16, 97), Card("RTX 4090", 24, 165), Card("A100 80 GB", 80, 312)
CPU = Card("CPU, 8 cores", 16, 0.77)
"""With AVX2 at 3 GHz, in float32."""
CARDS = {
    "llama3-8b-rtx4090": RTX_4090,
    "llama3-8b-16gb": RTX_4080,
    "llama3-8b-80gb": A100,
    "llama3-8b-ddp": RTX_4090,
    "llama3-70b-fsdp2": A100,
    "llama3.1-8b-rtx4090": RTX_4090,
    "qwen2.5-7b-rtx4090": RTX_4090,
    "qwen2.5-0.5b-cpu": CPU,
    "qwen3-8b-rtx4090": RTX_4090,
}


def minutes(values: Params, flops_per_token: float, card: Card) -> float:
    """Of one epoch over ROWS rows on as many cards as the recipe asks for."""
    return ROWS * TOKENS_PER_ROW * flops_per_token / (card.tflops * 1e12 * SHARE * values.hardware.num_processes) / 60


def measured(values: Params, results: Path) -> str:
    """Tokens a second and peak memory of this set-up, and the card on which gpu.py measured them."""
    if not results.exists():
        return "not measured"
    rows = values.hardware.per_device_train_batch_size
    how = "checkpointing" if values.hardware.activation_checkpointing else "none recomputed"
    setup = f"{values.base_model.attn_implementation}, {how}, {rows} row{'s' if rows > 1 else ''}"
    kind = "training" if values.base_model.load_in_4bit else "training_16bit"
    record: dict[str, Any] = json.loads(results.read_text(encoding="utf-8"))
    if values.base_model.name != "llama3-8b-instruct" or values.sequence.max_length != 3072 or values.hardware.num_processes > 1:
        return "not measured"
    for gpu, entry in record.items():
        found = entry["sections"].get(kind, {}).get(setup, {})
        if "tokens_per_second" in found:
            return f"{found['tokens_per_second']:,.0f} tokens/s, {found['peak_gib']} GiB on {gpu}"
    return "not measured"


@cache
def needs(name: str) -> Estimate:
    """Of a recipe; a pass over a model of its shape takes seconds."""
    values = preflight.of_recipe(name)
    return estimate(values, preflight.shape_of(values.base_model.name))


def table(results: Path = RESULTS) -> str:
    lines = [
        "| recipe | cards | memory of a card, estimated | of it weights, activations | GFLOP a token | 10,000 rows, estimated | measured |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name in CARDS:
        values, card = preflight.of_recipe(name), CARDS[name]
        needed = needs(name)
        count = values.hardware.num_processes
        lines.append(
            f"| `{name}` | {count} x {card.name} | {needed.total / 2**30:.1f} GiB of {card.memory_gb * 1e9 / 2**30:.1f} "
            f"| {needed.weights / 2**30:.1f}, {needed.activations / 2**30:.1f} | {needed.flops_per_token / 1e9:.0f} "
            f"| {minutes(values, needed.flops_per_token, card):.0f} min | {measured(values, results)} |"
        )
    return "\n".join(lines)


def page(text: str, results: Path = RESULTS) -> str:
    """The document with a new table in its place."""
    found = re.subn(rf"(?s){re.escape(BEGIN)}.*{re.escape(END)}", lambda _: f"{BEGIN}\n\n{table(results)}\n\n{END}", text)
    assert found[1] == 1, f"{PAGE} has no place for the table"
    return found[0]


def main() -> None:
    assert set(CARDS) == set(recipes.names()) - {"tiny-cpu"}, "a recipe has no card here"
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
