from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from qlora.core.errors import MachineError
from qlora.model.chat_template import ChatTemplate
from qlora.params import Params
from qlora.prediction import generation
from qlora.prediction.generation import batches_of, generate


def reader(tokenizer: Any) -> Callable[[Sequence[int]], str]:
    return lambda ids: str(tokenizer.decode(list(ids), skip_special_tokens=True)).strip()


def ask(
    model: Any, tokenizer: Any, texts: list[str], params: Params, *, stop: str = "\n", context: int = 512, seed: int = 0, **changes: Any
) -> list[tuple[str, bool]]:
    """Answers of the base model in its own plain form."""
    prompts = [[tokenizer.bos_token_id, *tokenizer.encode(f"Task.\n{text}\nResult.\n", add_special_tokens=False)] for text in texts]
    stops = [tokenizer.convert_tokens_to_ids(stop)]
    values = params.predict.model_copy(update={"max_new_tokens": 12, **changes})
    done: list[Any] = []
    batches = dict(enumerate(batches_of(prompts, values.batch_tokens, values.max_new_tokens, context)))
    answers = generate(
        model, tokenizer, prompts, batches, values, seed=seed, stop_ids=stops, context=context, content_of=reader(tokenizer), done=done.append
    )
    assert {index: answer for made in done for index, answer in made.items()} == answers
    assert len(done) == len(batches)
    return [(answers[place].text, answers[place].stopped) for place in range(len(texts))]


def test_the_longest_prompts_are_answered_first_and_each_once() -> None:
    prompts = [[0] * length for length in (3, 5, 1, 5, 2)]
    # Two of 5 + 1 tokens are 12, and three of 3 + 1.
    assert batches_of(prompts, 12, 1) == [[1, 3], [0, 4, 2]]
    assert batches_of(prompts, 11, 1) == [[1], [3], [0, 4], [2]]
    assert batches_of(prompts, 1, 1) == [[1], [3], [0], [4], [2]], "a prompt that alone exceeds the budget is answered alone"
    assert batches_of([], 12, 1) == []
    assert batches_of(prompts, 12, 1, context=3) == [[1], [3], [0], [4, 2]], "without room for a whole answer a prompt is alone"


TEXTS = ['Spell "velat".', "What is 20 + 22?", 'Say "mo" twice.', 'What is the first letter of "dunar"?', "What number comes after 345?"]


def test_the_base_model_knows_its_tasks_in_its_own_form(tiny_model: Any, tokenizer: Any, default_params: Params) -> None:
    assert ask(tiny_model, tokenizer, TEXTS, default_params) == [("v-e-l-a-t", True), ("42", True), ("mo mo", True), ("d", True), ("346", True)]


def test_the_models_own_generation_settings_change_no_answer(tiny_model: Any, tokenizer: Any, default_params: Params) -> None:
    expected = ask(tiny_model, tokenizer, TEXTS, default_params)
    tiny_model.generation_config.repetition_penalty = 5.0
    tiny_model.generation_config.min_p = 0.5
    assert ask(tiny_model, tokenizer, TEXTS, default_params) == expected


@pytest.mark.parametrize("batch_tokens", [1, 70, 140])
def test_answers_do_not_depend_on_the_batch(tiny_model: Any, tokenizer: Any, default_params: Params, batch_tokens: int) -> None:
    assert ask(tiny_model, tokenizer, TEXTS, default_params, batch_tokens=batch_tokens) == ask(tiny_model, tokenizer, TEXTS, default_params)


@pytest.mark.parametrize(
    ("batch_tokens", "said"),
    [
        # Two prompts of 21 + 12 tokens fill 80, one of them takes 33.
        (80, r"2 prompt\(s\) of up to 21 tokens were answered with up to 12 more.* is 80; half .*`dvc exp run -S predict.batch_tokens=33`"),
        (1, r"1 prompt\(s\) of up to 21 tokens .*No predict.batch_tokens makes a batch smaller than that: lower predict.max_new_tokens"),
    ],
)
@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory. Tried.\nmore"), RuntimeError("can't allocate memory: 9 bytes"), MemoryError()]
)
def test_a_batch_without_memory_names_a_budget_that_should_fit(
    tiny_model: Any, tokenizer: Any, default_params: Params, monkeypatch: pytest.MonkeyPatch, batch_tokens: int, said: str, error: Exception
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(generation, "_generate_batch", fail)
    with pytest.raises(MachineError, match=said) as caught:
        ask(tiny_model, tokenizer, TEXTS, default_params, batch_tokens=batch_tokens)
    assert (caught.value.code, caught.value.exit_code) == ("out-of-memory", 3)
    assert "\nmore" not in caught.value.message


def test_an_error_that_is_not_about_memory_is_let_through(
    tiny_model: Any, tokenizer: Any, default_params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(generation, "_generate_batch", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        ask(tiny_model, tokenizer, TEXTS, default_params)


def test_an_answer_is_cut_at_max_new_tokens_and_says_so(tiny_model: Any, tokenizer: Any, default_params: Params) -> None:
    assert ask(tiny_model, tokenizer, TEXTS[:1], default_params, max_new_tokens=3) == [("v-e", False)]


def test_an_answer_is_cut_where_the_context_ends_whatever_its_batch_does(tiny_model: Any, tokenizer: Any, default_params: Params) -> None:
    length = 1 + len(tokenizer.encode(f"Task.\n{TEXTS[0]}\nResult.\n", add_special_tokens=False))
    answers = ask(tiny_model, tokenizer, TEXTS[:3], default_params, context=length + 5)
    assert answers[0] == ("v-e-l", False)
    assert answers[2] == ("mo mo", True)


def test_sampling_repeats_with_its_seed_and_differs_with_another(tiny_model: Any, tokenizer: Any, default_params: Params) -> None:
    def sampled(seed: int) -> list[tuple[str, bool]]:
        return ask(tiny_model, tokenizer, ["Tell me a story."] * 4, default_params, do_sample=True, temperature=3.0, top_p=1.0, seed=seed)

    assert sampled(1) == sampled(1)
    assert sampled(1) != sampled(2)


def test_the_stop_tokens_are_the_templates_and_the_models(tiny_model: Any, tokenizer: Any, template: ChatTemplate) -> None:
    from qlora.model.loading import stop_token_ids

    tiny_model.generation_config.eos_token_id = [7, tokenizer.eos_token_id]
    assert stop_token_ids(tiny_model, tokenizer, template.stop_ids) == sorted({7, tokenizer.eos_token_id})


def test_a_drawn_answer_does_not_depend_on_which_other_batches_a_process_answers(tiny_model: Any, tokenizer: Any, default_params: Params) -> None:
    prompts = [[tokenizer.bos_token_id, *tokenizer.encode(f"Task.\n{text}\n", add_special_tokens=False)] for text in TEXTS]
    values = default_params.predict.model_copy(update={"do_sample": True, "temperature": 3.0, "top_p": 1.0, "max_new_tokens": 8})
    batches = dict(enumerate(batches_of(prompts, 50, values.max_new_tokens)))
    assert len(batches) > 2

    def drawn(own: dict[int, list[int]]) -> dict[int, str]:
        made = generate(
            tiny_model,
            tokenizer,
            prompts,
            own,
            values,
            seed=5,
            stop_ids=[tokenizer.eos_token_id],
            context=512,
            content_of=reader(tokenizer),
            done=lambda _: None,
        )
        return {place: answer.text for place, answer in made.items()}

    shares = [{number: batches[number]} for number in batches]
    assert drawn(batches) == {place: text for share in reversed(shares) for place, text in drawn(share).items()}


def test_a_model_that_has_no_place_beyond_its_context_is_not_asked_for_one(tokenizer: Any, default_params: Params) -> None:
    """Learned positions end with the context; rotary ones go on."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=32, n_embd=16, n_layer=1, n_head=2, eos_token_id=0, bos_token_id=0)
    prompts = [[5] * 30, [6] * 4, [7] * 9]
    values = default_params.predict.model_copy(update={"max_new_tokens": 20})
    batches = dict(enumerate(batches_of(prompts, 90, 20, context=32)))
    answers = generate(
        GPT2LMHeadModel(config).eval(),
        tokenizer,
        prompts,
        batches,
        values,
        seed=0,
        stop_ids=[],
        context=32,
        content_of=reader(tokenizer),
        done=lambda _: None,
    )
    assert [answers[place].tokens for place in range(3)] == [2, 20, 20]
