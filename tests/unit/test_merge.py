"""A merged model is the base model plus the adapter, summed in float32 and rounded once."""

import json
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora.core.conversation import Conversation, Message
from qlora.core.errors import InputError, MachineError
from qlora.delivery import equivalence, merge
from qlora.model import adapter, loading
from qlora.params import Params
from tests.unit.conftest import TINY
from tests.unit.trainings import changed

Adapter = Callable[..., Params]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Two wait for each other where others use the machine too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def trained(template: Any, default_params: Params, tmp_path: Path) -> Adapter:
    """Publishes an adapter whose weights are random, as a training would leave them, at tmp_path/adapter."""

    def make(**changes: Any) -> Params:
        from peft import get_peft_model

        from qlora.training.lora import lora_config

        values = changed(default_params, lora__r=4, runtime__progress=False, **changes)
        base = loading.load_model(values.base_model, TINY, CPU, progress=False)
        model: Any = get_peft_model(base, lora_config(values.lora, base))
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
        adapter.publish(model, template, tmp_path / "adapter", "tiny")
        return values

    return make


def logits(model: Any) -> Any:
    ids = torch.arange(20, 60)[None]
    with torch.inference_mode():
        return model.eval()(input_ids=ids, use_cache=False).logits[0]


def adapted(values: Params, folder: Path) -> Any:
    base = loading.load_model(values.base_model, TINY, CPU, progress=False)
    return adapter.load_adapter(base, folder / "adapter", "tiny")


def merged_from_disk(values: Params, folder: Path, template: Any, dtype: Any) -> Any:
    target = folder / f"merged-{dtype}"
    merge.write(merge.merged_model(values, TINY, folder / "adapter", dtype), template, values, folder / "adapter", target)
    plain = values.base_model.model_copy(update={"load_in_4bit": False, "load_in_8bit": False, "dtype": dtype})
    return loading.load_model(plain, target, CPU, progress=False)


MOST_LAYERS = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj", "embed_tokens", "lm_head"]
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"lora__use_rslora": True},
    "dora": {"lora__use_dora": True},
    "whole embeddings, tied to the head": {"lora__modules_to_save": ["embed_tokens"]},
    "whole norms": {"lora__modules_to_save": ["norm"]},
    "nearly all layers in full": {"lora__target_modules": ["o_proj"], "lora__modules_to_save": MOST_LAYERS},
    "the head alone, tied before": {"lora__target_modules": ["q_proj", "lm_head"]},
}


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer:UserWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_a_merge_in_float32_answers_as_the_adapter(trained: Adapter, template: Any, tmp_path: Path, kind: str) -> None:
    values = trained(**KINDS[kind])
    ours, theirs = logits(adapted(values, tmp_path)), logits(merged_from_disk(values, tmp_path, template, "float32"))
    kls, same = equivalence.distances(ours, theirs)
    assert float(kls.max()) <= 1e-6
    assert bool(same.all())
    base = logits(loading.load_model(values.base_model, TINY, CPU, progress=False))
    assert float(equivalence.distances(ours, base)[0].mean()) > 1e-3, "an adapter that does something"
    config = json.loads((tmp_path / "merged-float32/config.json").read_text(encoding="utf-8"))
    assert config["tie_word_embeddings"] == (kind != "the head alone, tied before")
    assert str(tmp_path) not in (tmp_path / "merged-float32/config.json").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("kind", "dtype"), [("plain", "float16"), ("plain", "bfloat16"), ("dora", "bfloat16"), ("whole embeddings, tied to the head", "bfloat16")]
)
def test_a_merge_in_16_bits_is_that_in_32_bits_rounded_once(trained: Adapter, tmp_path: Path, kind: str, dtype: Any) -> None:
    values = trained(**KINDS[kind])
    exact = merge.merged_model(values, TINY, tmp_path / "adapter", "float32").state_dict()
    rounded = merge.merged_model(values, TINY, tmp_path / "adapter", dtype).state_dict()
    assert exact.keys() == rounded.keys()
    for name, weight in exact.items():
        assert rounded[name].dtype == getattr(torch, dtype)
        assert torch.equal(rounded[name], weight.to(getattr(torch, dtype))), name


@pytest.mark.parametrize("quantised", ["load_in_4bit", "load_in_8bit"])
def test_an_adapter_of_quantised_weights_is_merged_into_those_it_never_saw(trained: Adapter, template: Any, tmp_path: Path, quantised: str) -> None:
    values = trained(**{f"base_model__{quantised}": True})
    merged = merged_from_disk(values, tmp_path, template, "float32")
    ours, theirs = logits(adapted(values, tmp_path)), logits(merged)
    assert 1e-4 < float(equivalence.distances(ours, theirs)[0].mean()) < 1, "quantisation is seen"
    unquantised = values.model_copy(update={"base_model": values.base_model.model_copy(update={quantised: False})})
    assert float(equivalence.distances(logits(adapted(unquantised, tmp_path)), theirs)[0].max()) <= 1e-6


def rows(count: int) -> list[Conversation]:
    return [
        Conversation(f"{number:02}", "c", [Message(role="user", content=f"{number} + 1?"), Message(role="assistant", content=str(number + 1))])
        for number in range(count)
    ]


def compared(trained: Adapter, template: Any, folder: Path, conversations: list[Conversation]) -> tuple[Any, list[bool]]:
    """What was found, and whether the first model was gone when the second was asked for."""
    values = trained(predict__max_new_tokens=4)
    merged_from_disk(values, folder, template, "float32")
    first: list[weakref.ref[Any]] = []
    gone: list[bool] = []

    def load_adapted() -> Any:
        model = adapted(values, folder)
        first.append(weakref.ref(model.get_base_model()))
        return model

    def load_merged() -> Any:
        gone.append(first[0]() is None)
        return loading.load_model(values.base_model, folder / "merged-float32", CPU, progress=False)

    sides = (load_adapted, load_merged, template, template)
    return equivalence.compare(*sides, conversations, values.predict, CPU, scratch=folder, progress=False), gone


def test_one_model_is_loaded_at_a_time(trained: Adapter, template: Any, tmp_path: Path) -> None:
    found, gone = compared(trained, template, tmp_path, rows(3))
    assert gone == [True]
    assert (found.conversations, found.answers, found.answers_equal, found.template_equal) == (3, 3, 1.0, 1.0)
    assert found.tokens == sum(end - start for one in rows(3) for row in template.encode(one).rows for start, end in row.spans)
    assert found.kl_max <= 1e-6
    assert found.nll_adapter == pytest.approx(found.nll_merged, rel=1e-5)
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", "merged-float32"}, "the file of logits is gone"


def test_the_file_of_logits_is_bounded(trained: Adapter, template: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = [sum(end - start for row in template.encode(one).rows for start, end in row.spans) for one in rows(3)]
    vocabulary = json.loads((TINY / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    monkeypatch.setattr(equivalence, "LOGITS_BYTES", 4 * vocabulary * sum(lengths[:2]))
    found, _ = compared(trained, template, tmp_path, rows(3))
    assert (found.conversations, found.answers) == (3, 3)
    assert found.tokens == sum(lengths[:2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_come_out_of_the_file_as_they_went_in(tmp_path: Path, dtype: torch.dtype) -> None:
    parts = [torch.randn(rows, 5).to(dtype) for rows in (2, 1)]
    with (tmp_path / "logits").open("w+b") as file:
        kept = equivalence._Logits(file)
        for part in parts:
            kept.add(part)
        assert all(torch.equal(one, other) for one, other in zip(kept.parts(), parts, strict=True))


def test_distances_are_kl_divergences_in_nats() -> None:
    ours, theirs = torch.tensor([[0.5, 0.5], [0.25, 0.75]]).log(), torch.tensor([[0.25, 0.75], [0.25, 0.75]]).log()
    kls, same = equivalence.distances(ours + 3, theirs)
    # 0.5 ln(0.5 / 0.25) + 0.5 ln(0.5 / 0.75)
    assert kls.tolist() == pytest.approx([0.143841, 0], abs=1e-6)
    assert same.tolist() == [False, True]


def test_a_server_ends_its_answers_where_the_evaluation_does(trained: Adapter, template: Any, tmp_path: Path) -> None:
    values = trained(predict__do_sample=True, predict__temperature=0.7)
    target = tmp_path / "merged"
    merge.write(merge.merged_model(values, TINY, tmp_path / "adapter", "bfloat16"), template, values, tmp_path / "adapter", target)
    found = json.loads((target / "generation_config.json").read_text(encoding="utf-8"))
    stops = [template.tokenizer.convert_tokens_to_ids("<|eot_id|>")]
    assert set(stops) <= set(found["eos_token_id"])
    assert (found["do_sample"], found["temperature"], found["top_p"], found["top_k"]) == (True, 0.7, 0.9, 0)
    assert "max_new_tokens" not in found, "vLLM takes it for a limit of every request"
    # Those of a file that this process creates: safetensors alone would leave its owner's.
    (tmp_path / "new").touch()
    assert {path.stat().st_mode for path in target.iterdir()} == {(tmp_path / "new").stat().st_mode}
    for path in (tmp_path / "adapter").iterdir():
        if path.name not in (adapter.CONFIG, adapter.WEIGHTS):
            assert (target / path.name).read_bytes() == path.read_bytes()


def test_numbers_that_overflow_in_the_last_cast_are_named(trained: Adapter, tmp_path: Path) -> None:
    """Of a layer that was merged, and of one that was not: float16 ends at 65,504."""
    for target in ("q_proj", "norm"):
        values = trained(lora__modules_to_save=["norm"])
        weights = load_file(tmp_path / "adapter" / adapter.WEIGHTS)
        large = {name: weight * 0 + 7e4 for name, weight in weights.items() if f"{target}." in name}
        save_file({**weights, **large}, tmp_path / "adapter" / adapter.WEIGHTS, metadata={"format": "pt"})
        with pytest.raises(InputError, match=rf"\[merge-not-finite\] \S*{target}\.weight: .* in float16, which ends at 6.55e\+04: --dtype bfloat16"):
            merge.merged_model(values, TINY, tmp_path / "adapter", "float16")
        assert merge.merged_model(values, TINY, tmp_path / "adapter", "bfloat16").dtype == torch.bfloat16


def test_what_can_not_be_merged_is_refused(trained: Adapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = trained()
    weights = load_file(tmp_path / "adapter" / adapter.WEIGHTS)
    name = sorted(weights)[0]
    save_file({**weights, name: weights[name] * float("nan")}, tmp_path / "adapter" / adapter.WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"\[merge-not-finite\] .*layers.0.*NaNs"):
        merge.merged_model(values, TINY, tmp_path / "adapter", "bfloat16")
    save_file(weights, tmp_path / "adapter" / adapter.WEIGHTS, metadata={"format": "pt"})
    settings = tmp_path / "adapter" / adapter.CONFIG
    plain = settings.read_text(encoding="utf-8")
    settings.write_text(json.dumps({**json.loads(plain), "alora_invocation_tokens": [1]}), encoding="utf-8")
    with pytest.raises(InputError, match=r"\[adapter-unloadable\] .* can't be merged"):
        merge.merged_model(values, TINY, tmp_path / "adapter", "bfloat16")
    settings.write_text(plain, encoding="utf-8")
    quantised = tmp_path / "quantised"
    quantised.mkdir()
    config = json.loads((TINY / "config.json").read_text(encoding="utf-8"))
    (quantised / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "bitsandbytes"}}), encoding="utf-8")
    with pytest.raises(InputError, match=r"\[merge-quantised\]"):
        merge.merged_model(values, quantised, tmp_path / "adapter", "bfloat16")
    monkeypatch.setattr(merge.shutil, "disk_usage", lambda place: type("Usage", (), {"free": 3_000_000}))
    merge.require_room(TINY, tmp_path / "merged", "bfloat16")
    with pytest.raises(MachineError, match=r"\[disk-space\] .* up to 0.0"):
        merge.require_room(TINY, tmp_path / "merged", "float32")
