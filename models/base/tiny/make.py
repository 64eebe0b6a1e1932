"""Make the embedded base model: a small Llama pretrained on exercises in plain text.

    python -m models.base.tiny.make [--steps 2400]

It learns the tasks of data/raw/tiny in plain forms such as `Task. ... Result. ...`, never a chat turn and never a problem
of the test split. The chat template of its tokenizer is in the style of Llama 3; its control tokens are untrained, which is
what fine-tuning is for. Writes config, safetensors (bfloat16) and tokenizer beside this file; prints the share of the
test questions that it answers in its plain form (the pipeline's default needs at least 0.8).
Takes about 20 minutes on two cores. Another kind of CPU rounds differently and makes another model: the files in Git
are the base model.
"""

import argparse
import itertools
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tqdm import tqdm
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from data.raw.tiny import make as world

FOLDER = Path(__file__).parent
SEED = 1
CONTEXT = 512
WINDOW = 256
BATCH = 16
LEARNING_RATE = 3e-3
WARMUP_STEPS = 100
QUESTION_WEIGHT = 0.1
"""Of a question's tokens in the loss: most are drawn at random, and there is nothing to learn in them."""
HARD = {"addition": 3.0, "compare": 2.0}
"""Categories that come more often than others."""

SPECIAL_TOKENS = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|pad|>"]
WORDING = """
Task. Result. Exercise: Answer: Question. Answer. What is Add and Write in capital letters. Put upper case. Which number
larger, smaller, or the first last letter of these letters order: Sort letters Say twice. Repeat word two times. Spell
How spelled? comes after before You are precise. Reply with bare result. answer one line. Answer only. system user assistant
"""
WORDS = list(dict.fromkeys(WORDING.split()))
"""Whole words: the exercises' wording. Invented words and numbers are spelled out."""

CHAT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {%- if message['role'] == 'assistant' %}
        {%- generation %}{{- message['content'] | trim + '<|eot_id|>' }}{%- endgeneration %}
    {%- else %}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Unigram over the words above, single characters and bytes: every text (but for "▁" itself, which stands for a space) decodes to itself."""
    characters = sorted({*map(chr, range(32, 127)), "\n", "▁", *world.ACCENTED_VOWELS, *world.ACCENTED_VOWELS.upper()})
    pieces = [(f"<0x{byte:02X}>", -20.0) for byte in range(256)]
    pieces += [(character, -10.0) for character in characters if character != " "]
    pieces += [(f"▁{text}", -5.0) for text in WORDS]
    # At the start of a line no space stands before a word.
    pieces += [(text, -5.0) for text in WORDS if (text[0].isupper() and len(text) > 1) or text in ("system", "user", "assistant")]
    vocabulary = [("<unk>", 0.0), *pieces]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"▁?[^▁\n]+|▁|\n"), "isolated")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in SPECIAL_TOKENS])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        pad_token="<|pad|>",
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def windows(exercises: Iterator[world.Turn], tokenizer: PreTrainedTokenizerFast) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of token ids and their weights in the loss, shape (BATCH, WINDOW) both.

    Each row begins with BOS and whole exercises follow, the last one cut off.
    """
    while True:
        rows, weights = [], []
        for _ in range(BATCH):
            ids, weight = [tokenizer.bos_token_id], [0.0]
            while len(ids) < WINDOW:
                exercise, answer = next(exercises)
                for text, each in ((exercise, QUESTION_WEIGHT), (answer + "\n", 1.0)):
                    added = tokenizer.encode(text, add_special_tokens=False)
                    ids += added
                    weight += [each] * len(added)
            rows.append(ids[:WINDOW])
            weights.append(weight[:WINDOW])
        yield torch.tensor(rows), torch.tensor(weights)


def pretrain(model: LlamaForCausalLM, batches: Iterator[tuple[torch.Tensor, torch.Tensor]], steps: int) -> None:
    """AdamW with warm-up and a cosine to zero."""
    decayed = [weight for weight in model.parameters() if weight.ndim > 1]
    other = [weight for weight in model.parameters() if weight.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.05}, {"params": other, "weight_decay": 0.0}], lr=LEARNING_RATE, betas=(0.9, 0.98)
    )
    progress = tqdm(itertools.islice(batches, steps), desc="pretraining", total=steps, unit="batch", mininterval=10)
    for step, (ids, weights) in enumerate(progress):
        rate = LEARNING_RATE * min(1.0, (step + 1) / WARMUP_STEPS) * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        loss = (losses * weights[:, 1:]).sum() / weights[:, 1:].sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        answers = losses[weights[:, 1:] == 1].mean().item()
        progress.set_postfix(answers=f"{answers:.3f}", refresh=False)


def plain_exact_match(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> dict[str, float]:
    """Share of the test split's questions, by category, that the model answers in its plain form."""
    _, _, test = world.make()
    right: dict[str, list[bool]] = {}
    model.eval()
    stop = tokenizer.convert_tokens_to_ids("\n")
    for row in tqdm(test, desc="plain questions"):
        turns = [message for message in row["messages"] if message["role"] != "system"]  # type: ignore[attr-defined]
        for question, answer in zip(turns[::2], turns[1::2], strict=True):
            prompt = world.plain(question["content"])
            ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer.encode(prompt, add_special_tokens=False)]])
            with torch.inference_mode():
                made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=48, do_sample=False, eos_token_id=stop)
            said = tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True).strip()
            right.setdefault(row["category"], []).append(said == answer["content"])  # type: ignore[arg-type]
    shares = {category: sum(marks) / len(marks) for category, marks in right.items()}
    marks = [mark for each in right.values() for mark in each]
    return {**shares, "all": sum(marks) / len(marks)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--folder", type=Path, default=FOLDER)
    arguments = parser.parse_args()
    torch.manual_seed(SEED)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    print(f"{model.num_parameters():,} parameters, vocabulary {len(tokenizer)}")
    drawn, _, _ = world.make()
    pretrain(model, windows(drawn.exercises(HARD), tokenizer), arguments.steps)
    model.to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    # Greedy unless asked otherwise, and every answer ends with the end of its turn.
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(arguments.folder)
    tokenizer.save_pretrained(arguments.folder)
    for category, share in plain_exact_match(model.float(), tokenizer).items():
        print(f"{category:10} {share:.3f}")


if __name__ == "__main__":
    main()
