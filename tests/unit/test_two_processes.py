"""Two processes train what one does with twice the accumulation: the same rows in the same updates, each once."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from qlora.model.device import set_up_device
from qlora.params import Params
from qlora.runtime.signals import Interruption
from qlora.training.checkpoints import Checkpoints
from qlora.training.tokenization import Example
from qlora.training.trainer import EpochOrder, conversations_of, make_trainer, rows_of
from tests.unit.trainings import adapted, changed
from tests.unit.two_processes import in_two_processes

STEPS = 20


def trained(params: Params, examples: list[Example], tokenizer: Any, folder: Path) -> dict[str, Any]:
    """After all updates: weights, losses, and the conversations of each update as (update, token ids)."""
    device = set_up_device(params.hardware, deterministic=True, processes=params.hardware.num_processes)
    assert device.type == "cpu"
    seen: list[tuple[int, tuple[int, ...]]] = []
    with Checkpoints(folder) as checkpoints:
        trainer = make_trainer(params, adapted(params), tokenizer, examples, examples[:7], checkpoints, Interruption())
        learned = {tuple(example.ids) for example in examples}

        class Watch(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                batches = trainer._batches
                seen.extend((state.global_step, tokens) for batch in batches for tokens in conversations_of(batch) if tokens in learned)

        seed = torch.initial_seed()
        trainer.add_callback(Watch())
        trainer.train()
    weights = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters() if weight.requires_grad}
    return {
        "weights": weights,
        "seen": seen,
        "losses": trainer.losses(),
        "validation": trainer.validation_losses(),
        "rows": trainer.train_rows,
        "seed": seed,
    }


def work(rank: int, params: Params, examples: list[Example], tokenizer: Any, folder: Path) -> None:
    torch.save(trained(params, examples, tokenizer, folder / "checkpoints"), folder / str(rank))


def by_two(params: Params, examples: list[Example], tokenizer: Any, folder: Path) -> list[dict[str, Any]]:
    folder.mkdir()
    in_two_processes(work, changed(params, hardware__num_processes=2), examples, tokenizer, folder)
    return [torch.load(folder / str(rank)) for rank in range(2)]


@pytest.fixture
def settings(few_steps: Params) -> Params:
    return changed(
        few_steps,
        train__max_steps=STEPS,
        train__num_train_epochs=50.0,
        train__batch_size=4,
        # Adam makes a step of this length of any gradient, also of one that is nothing but rounding.
        train__learning_rate=2e-4,
        train__eval_strategy="epoch",
        sequence__max_length=64,
        hardware__per_device_train_batch_size=1,
        hardware__num_threads=1,
        runtime__save_steps=3,
    )


@pytest.mark.parametrize(("packing", "four_bit"), [("bfd", False), ("none", False), ("bfd", True)])
def test_two_processes_make_the_updates_of_one(
    settings: Params, examples: list[Example], tokenizer: Any, tmp_path: Path, packing: str, four_bit: bool
) -> None:
    params = changed(settings, sequence__packing=packing, base_model__load_in_4bit=four_bit)
    # An odd number of rows, and a last update of an epoch that is made from fewer.
    examples = examples[: 19 if packing == "none" else 20]
    alone = trained(params, examples, tokenizer, tmp_path / "alone")
    assert alone["rows"] % 2 == 1
    assert alone["rows"] % params.train.batch_size
    first, second = by_two(params, examples, tokenizer, tmp_path / "two")
    assert len(alone["losses"]) == STEPS
    assert len(first["validation"]) == len(alone["validation"]) >= 2
    assert Counter(first["seen"] + second["seen"]) == Counter(alone["seen"])
    assert all(torch.equal(first["weights"][name], second["weights"][name]) for name in first["weights"])
    difference = max(float((first["weights"][name] - weight).abs().max()) for name, weight in alone["weights"].items())
    print(f"packing {packing}, 4-bit {four_bit}: largest difference of a weight: {difference:.1e}")
    assert difference <= 1e-5
    for curve in ("losses", "validation"):
        assert [step for step, _ in first[curve]] == [step for step, _ in alone[curve]]
        assert [loss for _, loss in first[curve]] == pytest.approx([loss for _, loss in alone[curve]], rel=1e-4)


def test_with_dropout_the_rows_are_the_same(settings: Params, examples: list[Example], tokenizer: Any, tmp_path: Path) -> None:
    params = changed(settings, lora__lora_dropout=0.1, train__max_steps=6)
    alone = trained(params, examples, tokenizer, tmp_path / "alone")
    first, second = by_two(params, examples, tokenizer, tmp_path / "two")
    assert Counter(first["seen"] + second["seen"]) == Counter(alone["seen"])
    # Not the same masks on both.
    assert (alone["seed"], first["seed"], second["seed"]) == (42, 42, 43)


def test_the_order_follows_from_seed_and_epoch() -> None:
    epoch = 0
    order = EpochOrder(rows=50, total=52, seed=1, epoch=lambda: epoch)
    first = list(order)
    torch.manual_seed(5)
    assert list(order) == first
    assert sorted(first[:50]) == list(range(50))
    assert first[50:] == [50, 51]
    epoch = 1
    assert list(order)[:50] != first[:50]
    assert list(EpochOrder(50, 52, 2, lambda: 0)) not in (first, list(order))


def test_one_process_has_no_row_that_only_fills_up(settings: Params, examples: list[Example]) -> None:
    from qlora.training.trainer import pad_to_multiple

    rows = rows_of(examples[:19], settings.sequence)
    assert pad_to_multiple(rows, 4) is rows
