"""`varlen`: each conversation of a packed row attends to itself alone, without a mask, and what the kernel doesn't compute is refused by name."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from qlora.core.errors import MachineError
from qlora.model import attention
from qlora.model.loading import load_model
from qlora.params import Params
from qlora.training import preflight
from qlora.training.tokenization import Example
from tests.unit.test_trainer import trainer_of
from tests.unit.trainings import adapted, changed

LENGTHS = [1, 12, 20, 7]
SIZES = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 5},
    "qwen2": {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    "qwen3": {"head_dim": 16},
    "gemma3_text": {"sliding_window": 4, "head_dim": 16},
    "phi3": {"pad_token_id": 0},
    "granite": {},
    "olmo2": {},
    "cohere2": {"sliding_window": 4},
}


def model_of(family: str, kind: str = "sdpa", **changes: Any) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **(SIZES | FAMILIES.get(family, {}) | changes))
    return AutoModelForCausalLM.from_config(config, dtype=torch.float64, attn_implementation=kind).train()


def packed(lengths: list[int] = LENGTHS) -> dict[str, Any]:
    """A pass as TRL's collator makes it, of conversations of these lengths."""
    generator = torch.Generator().manual_seed(1)
    begins = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return {
        "input_ids": torch.randint(0, 64, (1, sum(lengths)), generator=generator),
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "cu_seq_lens_q": begins,
        "cu_seq_lens_k": begins,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
        "use_cache": False,
    }


def logits_and_gradients(model: Any, inputs: dict[str, Any]) -> list[torch.Tensor]:
    model.zero_grad()
    with attention.packed_rows(inputs):
        logits = model(**inputs).logits
    logits.logsumexp(-1).sum().backward()
    return [logits.detach(), *(weight.grad.clone() for weight in model.parameters() if weight.grad is not None)]


@pytest.mark.parametrize("family", FAMILIES)
def test_it_computes_what_masked_sdpa_does(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also within sliding windows; no mask is made for it."""
    model, inputs = model_of(family), packed()
    masked = logits_and_gradients(model, {name: inputs[name] for name in ("input_ids", "position_ids", "use_cache")})
    model.set_attn_implementation("varlen")
    monkeypatch.setattr(attention, "sdpa_mask", lambda **_: pytest.fail("a mask was made"))
    monkeypatch.setattr(attention, "sdpa_attention_forward", lambda *_, **__: pytest.fail("sdpa was called"))
    alone = logits_and_gradients(model, inputs)
    assert len(masked) == len(alone) > 10
    assert max(float((a - b).abs().max()) for a, b in zip(masked, alone, strict=True)) <= 1e-12


@pytest.mark.parametrize("window", [None, 5, 100])
def test_the_loop_over_conversations_is_attention_by_its_formula(window: int | None) -> None:
    """softmax(q k / sqrt(d)) v over the tokens up to this one, written out; 4 heads share 2 keys and values."""
    generator = torch.Generator().manual_seed(2)
    query, key, value = (torch.randn(40, heads, 16, dtype=torch.float64, generator=generator) for heads in (4, 2, 2))
    found = attention.attend_apart(query, key, value, [0, 1, 13, 33, 40], scale=None, window=window)
    start = 0
    for length in LENGTHS:
        for place in range(start, start + length):
            first = max(start, place - window + 1) if window else start
            for head in range(4):
                scores = (key[first : place + 1, head // 2] @ query[place, head]) / 4
                assert (scores.softmax(0) @ value[first : place + 1, head // 2] - found[place, head]).abs().max() < 1e-12
        start += length


def test_a_packed_conversation_is_the_one_alone_in_one_row_and_in_several(
    few_steps: Params, examples: list[Example], tokenizer: Any, tmp_path: Path
) -> None:
    params = changed(few_steps, base_model__attn_implementation="varlen", lora__lora_dropout=0.0, hardware__per_device_train_batch_size=2)
    trainer = trainer_of(params, adapted(params), tokenizer, examples, [], tmp_path)
    model = trainer.model.double().eval()
    for size in (1, 2):
        rows = [trainer.train_dataset[place] for place in range(size)]
        batch = trainer.data_collator(rows)
        with torch.no_grad(), attention.packed_rows(batch):
            together = model(**{name: value for name, value in batch.items() if name != "labels"}, use_cache=False).logits[0]
        with torch.no_grad():
            start = 0
            for length in (length for row in rows for length in row["seq_lengths"]):
                alone = model(input_ids=batch["input_ids"][:, start : start + length], use_cache=False).logits[0]
                assert (together[start : start + length] - alone).abs().max() <= 1e-10
                start += length


def test_calls_that_name_no_conversations_are_sdpas() -> None:
    """A padded batch, and answers with a cache."""
    model = model_of("llama").eval()
    ids, mask = torch.randint(3, 64, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0
    found = {}
    for kind in ("sdpa", "varlen"):
        model.set_attn_implementation(kind)
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=mask).logits[:, -1]
        made = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0)
        found[kind] = (logits, made)
    assert torch.equal(found["sdpa"][0], found["varlen"][0])
    assert torch.equal(found["sdpa"][1], found["varlen"][1])


def test_packed_rows_without_where_they_begin_get_their_mask() -> None:
    """position_ids alone say so, as for sdpa."""
    model, inputs = model_of("llama"), packed()
    del inputs["cu_seq_lens_q"]
    masked = logits_and_gradients(model, inputs)
    model.set_attn_implementation("varlen")
    assert all(torch.equal(a, b) for a, b in zip(masked, logits_and_gradients(model, inputs), strict=True))


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("gpt_oss", {}, "GptOssAttention has attention sinks .*set it to 'eager'"),
        ("gemma2", {}, "Gemma2Attention caps its attention scores .*set it to 'eager'"),
        ("llama", {"attention_dropout": 0.1}, "LlamaAttention drops attention weights .*set it to 'sdpa'"),
        ("qwen2_moe", {"sliding_window": 7, "use_sliding_window": True, "max_window_layers": 1}, "its sliding window of 7 tokens: set it to 'sdpa'"),
    ],
)
def test_what_the_kernel_does_not_compute_is_refused_by_name(family: str, changes: dict[str, Any], words: str) -> None:
    model = model_of(family, "varlen", **changes).to(torch.float32)
    with pytest.raises(MachineError, match=rf"\[attention-missing\] base_model.attn_implementation = 'varlen': .*{words}"):
        logits_and_gradients(model, packed())


@pytest.mark.parametrize(("family", "words"), [("gpt_oss", "attention sinks"), ("gemma2", "caps its attention scores")])
def test_what_sdpa_would_leave_out_is_refused_without_packed_rows_too(family: str, words: str) -> None:
    """It ignores attention sinks without a word, and so would answers."""
    model = model_of(family, "varlen").to(torch.float32).eval()
    with pytest.raises(MachineError, match=words), torch.no_grad():
        model(input_ids=torch.arange(5)[None])


def test_a_model_that_does_not_tell_its_attention_where_conversations_begin_is_refused() -> None:
    """Without a mask and without that, they would attend to each other."""
    model = model_of("llama", "varlen")
    for layer in model.model.layers:
        forward = layer.self_attn.forward
        layer.self_attn.forward = lambda *arguments, forward=forward, **options: forward(
            *arguments, **{name: value for name, value in options.items() if name != "cu_seq_lens_q"}
        )
    with pytest.raises(MachineError, match="LlamaAttention is not told where the conversations of a row begin"):
        logits_and_gradients(model, packed())


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("llama", {"attention_dropout": 0.1}, "drops attention weights"),
        ("gemma2", {}, "takes no sdpa, which computes its answers: set it to 'eager'"),
        ("llama4_text", {}, "takes no flash kernels"),
    ],
)
def test_it_is_refused_before_anything_long_begins(default_params: Params, family: str, changes: dict[str, Any], words: str) -> None:
    params = changed(default_params, base_model__attn_implementation="varlen")
    config = AutoConfig.for_model(family, **(SIZES | changes))
    with pytest.raises(MachineError, match=words):
        preflight.check_machine(params, config)


def test_a_model_that_can_not_use_it_is_not_advised_to(default_params: Params) -> None:
    """The advice of a training that does not fit estimates it too."""
    params = changed(default_params, base_model__attn_implementation="eager")
    config = AutoConfig.for_model("gemma2", **SIZES)
    needed = preflight.estimate(params, config)
    assert not [line for line in preflight.advice(needed, params, config) if "attn_implementation" in line]


def test_it_is_refused_when_the_model_is_loaded(default_params: Params, tmp_path: Path) -> None:
    """By the baseline, before the weights are read."""
    AutoConfig.for_model("gemma2", **SIZES).save_pretrained(tmp_path)
    params = changed(default_params, base_model__attn_implementation="varlen").base_model
    with pytest.raises(MachineError, match="Gemma2ForCausalLM takes no sdpa"):
        load_model(params, tmp_path, torch.device("cpu"), progress=False)
