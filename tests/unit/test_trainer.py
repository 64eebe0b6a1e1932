"""Training on the embedded model: what must and must not move, and losses that are what they say."""

import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, set_seed

from qlora.core.errors import InputError
from qlora.params import Params
from qlora.runtime.signals import Interruption
from qlora.training.callbacks import DivergenceWarning
from qlora.training.checkpoints import Checkpoints
from qlora.training.lora import lora_config
from qlora.training.tokenization import IGNORE_INDEX, Example
from qlora.training.trainer import conversations_of, make_trainer
from tests.unit.trainings import adapted, changed


def trainer_of(params: Params, model: Any, tokenizer: Any, train: list[Example], validation: list[Example], folder: Path) -> Any:
    return make_trainer(params, model, tokenizer, train, validation, Checkpoints(folder), Interruption())


def trained(params: Params, examples: list[Example], tokenizer: Any, folder: Path) -> Any:
    trainer = trainer_of(params, adapted(params), tokenizer, examples, examples[:7], folder)
    trainer.train()
    return trainer


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def test_every_adapter_weight_moves_and_no_base_weight_does(few_steps: Params, examples: list[Example], tokenizer: Any, tmp_path: Path) -> None:
    model = adapted(few_steps)
    before = weights(model)
    trainer_of(few_steps, model, tokenizer, examples, examples[:7], tmp_path).train()
    for name, weight in weights(model).items():
        moved = not torch.equal(weight, before[name])
        assert moved == ("lora_" in name), name
        assert "lora_" not in name or weight.dtype == torch.float32


def test_two_runs_give_the_same_adapter_and_another_seed_another(few_steps: Params, examples: list[Example], tokenizer: Any, tmp_path: Path) -> None:
    def adapter(seed: int, name: str) -> dict[str, torch.Tensor]:
        found = weights(trained(changed(few_steps, train__seed=seed), examples, tokenizer, tmp_path / name).model)
        return {key: weight for key, weight in found.items() if "lora_" in key}

    first, again, other = adapter(1, "a"), adapter(1, "b"), adapter(2, "c")
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not all(torch.equal(first[key], other[key]) for key in first)


@pytest.mark.parametrize("packing", ["bfd", "none"])
def test_validation_loss_is_nats_over_supervised_tokens(
    few_steps: Params, examples: list[Example], tokenizer: Any, tmp_path: Path, packing: str
) -> None:
    params = changed(few_steps, sequence__packing=packing, hardware__per_device_train_batch_size=1 if packing == "bfd" else 2)
    trainer = trainer_of(params, adapted(params), tokenizer, examples, examples[:7], tmp_path)
    measured = trainer.evaluate()["eval_loss"]
    nats, tokens = 0.0, 0
    for example in examples[:7]:
        with torch.no_grad():
            log_probs = trainer.model(input_ids=torch.tensor([example.ids])).logits[0].log_softmax(-1)
        for place, label in enumerate(example.labels):
            if label != -100:
                nats -= float(log_probs[place - 1, label])
                tokens += 1
    assert measured == pytest.approx(nats / tokens, rel=1e-5)


def next_token_log_probabilities(model: Any, **row: torch.Tensor) -> torch.Tensor:
    """Of each token but the first of a row, given those before it."""
    with torch.no_grad():
        log_probabilities = model(**row, use_cache=False).logits[0].log_softmax(-1)
    return log_probabilities[:-1].gather(1, row["input_ids"][0, 1:, None])[:, 0]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("random_weights", [True, False])
def test_a_packed_conversation_has_the_log_probabilities_that_it_has_alone(
    few_steps: Params, examples: list[Example], tokenizer: Any, tmp_path: Path, attention: str, random_weights: bool
) -> None:
    """The embedded model in float64: untuned it gives some tokens a log-probability of -40, of which float32 keeps too few digits."""
    model = adapted(few_steps)
    if random_weights:
        set_seed(0)
        base = AutoModelForCausalLM.from_config(model.config, dtype=torch.float32)
        model = get_peft_model(base, lora_config(few_steps.lora, base))
    trainer = trainer_of(few_steps, model, tokenizer, examples, [], tmp_path)
    model = trainer.model if random_weights else trainer.model.double()
    model.set_attn_implementation(attention)
    shared = 0
    for row in trainer.train_dataset:
        batch = trainer.data_collator([row])
        assert "attention_mask" not in batch
        packed = next_token_log_probabilities(model, **{key: batch[key] for key in ("input_ids", "position_ids")})
        start = 0
        for length in row["seq_lengths"]:
            alone = next_token_log_probabilities(model, input_ids=batch["input_ids"][:, start : start + length])
            assert (packed[start : start + length - 1] - alone).abs().max() <= (1e-5 if random_weights else 1e-10)
            start += length
        shared += len(row["seq_lengths"]) > 1
    assert shared


@pytest.mark.parametrize("rows", [1, 2])
def test_the_same_tokens_are_learned_packed_or_not(few_steps: Params, examples: list[Example], tokenizer: Any, tmp_path: Path, rows: int) -> None:
    """After the collator, in the batches that the model gets."""

    def learned(packing: str) -> list[list[int]]:
        params = changed(few_steps, sequence__packing=packing, hardware__per_device_train_batch_size=rows)
        trainer = trainer_of(params, adapted(params), tokenizer, examples, [], tmp_path)
        runs = []
        for batch in trainer.get_train_dataloader():
            for ids, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
                for learned_here, pairs in itertools.groupby(zip(ids, labels, strict=True), key=lambda pair: pair[1] != IGNORE_INDEX):
                    if learned_here:
                        numbers, targets = map(list, zip(*pairs, strict=True))
                        assert targets == numbers
                        runs.append(targets)
        return sorted(runs)

    expected = sorted([label for label in example.labels if label != IGNORE_INDEX] for example in examples)
    assert learned("bfd") == learned("none") == expected


def test_accumulation_changes_the_memory_not_the_update(few_steps: Params, examples: list[Example], tokenizer: Any, tmp_path: Path) -> None:
    """Two rows at once and two rows one after the other are one update; without dropout they differ by rounding alone."""

    def losses(rows: int) -> list[float]:
        params = changed(few_steps, lora__lora_dropout=0.0, hardware__per_device_train_batch_size=rows)
        history = trained(params, examples, tokenizer, tmp_path / str(rows)).state.log_history
        return [entry["loss"] for entry in history if "loss" in entry]

    assert losses(1) == pytest.approx(losses(2), rel=1e-3)
    assert len(losses(1)) == 3


def test_activation_checkpointing_changes_the_memory_not_the_update(
    few_steps: Params, examples: list[Example], tokenizer: Any, tmp_path: Path
) -> None:
    def losses(checkpointing: bool) -> list[float]:
        params = changed(few_steps, hardware__activation_checkpointing=checkpointing)
        history = trained(params, examples, tokenizer, tmp_path / str(checkpointing)).state.log_history
        return [entry["loss"] for entry in history if "loss" in entry]

    assert losses(True) == pytest.approx(losses(False), rel=1e-5)


def four_bit(params: Params) -> Params:
    return changed(params, base_model__load_in_4bit=True)


def test_4bit_training_keeps_a_float32_adapter_and_learns(few_steps: Params, examples: list[Example], tokenizer: Any, tmp_path: Path) -> None:
    import bitsandbytes

    trainer = trained(changed(four_bit(few_steps), train__max_steps=6, train__num_train_epochs=6.0), examples, tokenizer, tmp_path)
    layers = [module for module in trainer.model.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]
    assert layers
    assert {layer.weight.quant_type for layer in layers} == {"nf4"}
    assert all(layer.weight.quant_state.nested for layer in layers), "double quantisation is off"
    assert all(weight.dtype == torch.float32 for weight in trainer.model.parameters() if weight.requires_grad)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.7 * losses[0]


def test_4bit_gradients_after_an_evaluation_equal_those_before_it(few_steps: Params, examples: list[Example]) -> None:
    """bitsandbytes repacks 4-bit weights for inference in the first eval-mode pass on CPUs with avx512_bf16; there is no way back."""
    params = changed(four_bit(few_steps), lora__lora_dropout=0.0, base_model__bnb_4bit_compute_dtype="bfloat16")
    model = adapted(params)
    batch = {"input_ids": torch.tensor([examples[0].ids]), "labels": torch.tensor([examples[0].labels])}

    def gradients() -> dict[str, torch.Tensor]:
        model.train()
        model.zero_grad()
        model(**batch, use_cache=False).loss.backward()
        return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.requires_grad}

    before = gradients()
    model.eval()
    with torch.no_grad():
        model(**batch)
        model(input_ids=batch["input_ids"][:, :1])
    after = gradients()
    assert all(torch.equal(before[name], after[name]) for name in before)
    flags = {module.support_avx512bf16_for_cpu for module in model.modules() if hasattr(module, "support_avx512bf16_for_cpu")}
    assert flags == {False}


def test_what_is_no_number_ends_the_training_with_the_step_and_the_conversations(
    few_steps: Params, examples: list[Example], tokenizer: Any, tmp_path: Path
) -> None:
    trainer = trainer_of(changed(few_steps, train__batch_size=2), adapted(few_steps), tokenizer, examples, examples[:7], tmp_path)
    step = trainer.training_step

    def broken_at_the_second(model: Any, inputs: Any, *rest: Any) -> Any:
        loss = step(model, inputs, *rest)
        return loss * float("nan") if trainer.state.global_step == 1 else loss

    trainer.training_step = broken_at_the_second
    with pytest.raises(InputError, match=r"train-not-finite\] the loss at step 2 is nan, nothing was published.*learning_rate") as error:
        trainer.train()
    named = set(re.findall(r"\d+", error.value.message.partition("conversations ")[2].partition(":")[0]))
    assert named
    assert named < {example.conversation for example in examples}
    sampled = [ids for batch in trainer._batches for ids in conversations_of(batch)]
    assert named == {example.conversation for example in examples if tuple(example.ids) in sampled}
    assert list(tmp_path.glob("checkpoint-*")) == []


@pytest.mark.parametrize("packing", ["bfd", "none"])
def test_the_conversations_of_a_batch_are_told_from_its_tensors(
    few_steps: Params, examples: list[Example], tokenizer: Any, tmp_path: Path, packing: str
) -> None:
    params = changed(few_steps, sequence__packing=packing, hardware__per_device_train_batch_size=2)
    trainer = trainer_of(params, adapted(params), tokenizer, examples, [], tmp_path)
    found = [ids for batch in trainer.get_train_dataloader() for ids in conversations_of(batch)]
    assert sorted(found) == sorted(tuple(example.ids) for example in examples)


def test_a_loss_that_rises_far_above_its_lowest_is_warned_of_once(capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import TrainerState

    warning = DivergenceWarning()
    state: Any = TrainerState()
    for loss in [4.0, 3.0, 2.0, 2.0, 2.0] + [2.2] * 40 + [9.0] * 40:
        warning.on_log(None, state, None, {"loss": loss})  # type: ignore[arg-type]
    assert capsys.readouterr().err.count("warning: the loss diverges") == 1
    calm = DivergenceWarning()
    for loss in [4.0, 3.0, 2.0] + [1.9, 2.3] * 200:
        calm.on_log(None, state, None, {"loss": loss})  # type: ignore[arg-type]
    assert capsys.readouterr().err == ""
