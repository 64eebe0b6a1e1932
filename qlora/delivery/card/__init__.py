"""The model card: what can be said of an adapter, computed from dvc.lock, manifests, params, metrics and Git.

A page of Markdown with the Hub's front matter (https://huggingface.co/docs/hub/model-cards). The same sources give the same bytes. Imports no torch.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from qlora.core.dvc_lock import Recorded, flat
from qlora.core.text import in_markdown
from qlora.delivery.card.sources import Sources
from qlora.params.lora import LoraParams
from qlora.scoring.report import LEFT_OUT

FEW_TURNS = 30
"""Answers of a category below which its numbers are called uncertain."""


def render(sources: Sources) -> str:
    """The card."""
    sections = (_opening, _results, _data, _training, _not_tested, _reproduction, _chain, _params)
    return _front_matter(sources) + "\n\n".join("\n".join(section(sources)) for section in sections) + "\n"


def _front_matter(sources: Sources) -> str:
    from huggingface_hub import EvalResult, ModelCardData  # noqa: PLC0415 - half a second that --help need not take

    datasets = sorted({str(record["repo_id"]) for record in sources.raw.values()})
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=datasets[0] if len(datasets) == 1 else "custom",
            dataset_name=f"test split of {_data_name(sources.params.data.test_file)}",
            metric_type=name,
            metric_value=round(value, 6),
        )
        for name, row in sources.reports["evaluation"]["difference"].items()
        # The others describe answers; no value of them is better.
        if "p_better" in row and (value := sources.reports["evaluation"]["tuned"][name]) is not None
    ]
    data = ModelCardData(
        license=sources.by_hand.license,
        language=sources.by_hand.language,
        base_model=sources.base.repo_id,
        base_model_relation="adapter" if sources.base.repo_id else None,
        datasets=datasets or None,
        library_name="peft",
        pipeline_tag="text-generation",
        tags=["lora", "qlora" if sources.params.base_model.load_in_4bit else "sft", "dvc"],
        model_name=_title(sources),
        eval_results=results,
    )
    return f"---\n{data.to_yaml()}\n---\n\n"


def _title(sources: Sources) -> str:
    return f"LoRA adapter on {sources.base.repo_id or sources.params.base_model.name}"


def _data_name(path: str) -> str:
    """The folder below data/raw, or what the path ends with."""
    parts = Path(path).parts
    return parts[2] if parts[:2] == ("data", "raw") and len(parts) > 2 else Path(path).stem


def _first_weights(lora: LoraParams) -> str:
    """Why the published adapter has another rank than the param; nothing where it has not."""
    if lora.init_lora_weights is True:
        return ""
    method = {"pissa": "PiSSA", "olora": "OLoRA"}[lora.init_lora_weights]
    return f"; trained from the first weights of {method} and published as rank {2 * lora.r}"


def _opening(sources: Sources) -> Iterator[str]:
    lora, trained = sources.params.lora, sources.reports["train"]["train"]
    yield f"# {in_markdown(_title(sources))}"
    yield ""
    yield (
        f"LoRA of rank {lora.r} (alpha {lora.lora_alpha}{_first_weights(lora)}) on {_base(sources)}, "
        f"fine-tuned on {trained['conversations']['out']:,} conversations "
        f"({trained['tokens']['supervised']:,} supervised tokens an epoch). Every number here was computed by `python -m tools.card` from commit "
        f"`{sources.commit}`; `--check` computes it again."
    )
    yield ""
    yield "## Intended use"
    yield ""
    yield sources.by_hand.intended_use


def _base(sources: Sources) -> str:
    if sources.base.repo_id:
        link = _link(sources.base.repo_id, "")
        return f"{link} at commit {_code(str(sources.base.revision))}, licence {in_markdown(sources.base_license or 'not stated')}"
    return f"{_code(sources.params.base_model.name)}, a base model of the repository's own"


def _link(repo_id: str, kind: str) -> str:
    return f"[{in_markdown(repo_id)}](https://huggingface.co/{kind}{quote(repo_id)})"


def _code(text: str) -> str:
    """In the font of code; with a grave accent or a bar in it no code span of Markdown can be trusted to end where it should."""
    return f"`{text}`" if text.isprintable() and not {"`", "|"} & set(text) else f"<code>{in_markdown(text)}</code>"


def _results(sources: Sources) -> Iterator[str]:
    base, tuned, values = sources.reports["evaluation"]["base"], sources.reports["evaluation"]["tuned"], sources.params.predict
    counts = tuned["counts"]
    decoding = f"sampled (temperature {values.temperature}, top_p {values.top_p})" if values.do_sample else "greedy"
    yield "## Results"
    yield ""
    yield (
        f"{counts['turns']:,} turns of {_measured(counts):,} test conversations, {decoding}, at most {values.max_new_tokens} new tokens. The test "
        "split steered nothing. Intervals: paired bootstrap over conversations, 95 %."
    )
    yield ""
    yield from _table(
        ("metric", "base", "tuned", "difference", "95 % interval"),
        (
            (f"`{name}`", _number(base[name]), _number(tuned[name]), _signed(row["delta"]), _interval(row))
            for name, row in sources.reports["evaluation"]["difference"].items()
        ),
    )
    if deviation := tuned.get("seed_deviation"):
        yield ""
        spread = ", ".join(f"`{name}` {_number(value)}" for name, value in sorted(deviation.items()))
        yield f"Standard deviation between the {len(values.generation_seeds)} seeds of the answers: {spread}."
    yield ""
    yield from _table(
        ("category", "answers", "exact match", "ROUGE-L", "nll"),
        (
            (in_markdown(name), f"{row['turns']:,}", *(_number(row[measure]) for measure in ("exact_match", "rouge_l", "nll")))
            for name, row in tuned["by_category"].items()
        ),
    )
    if "benchmark" in sources.found:
        yield ""
        yield from _benchmark(sources.found["benchmark"])


def _benchmark(record: Mapping[str, Any]) -> Iterator[str]:
    yield "Standard benchmarks, by lm-evaluation-harness:"
    yield ""
    rows = [(task, name, delta) for task, row in record["delta"].items() for name, delta in row.items()]
    yield from _table(
        ("task", "metric", "base", "tuned", "difference"),
        (
            (in_markdown(task), in_markdown(name), _number(record["base"][task][name]), _number(record["tuned"][task][name]), f"{delta:+.4f}")
            for task, name, delta in rows
        ),
    )


def _measured(counts: Mapping[str, int]) -> int:
    return counts["conversations"] - sum(counts[reason] for reason in LEFT_OUT)


def _data(sources: Sources) -> Iterator[str]:
    prepared, trained = sources.reports["prepare"], sources.reports["train"]
    yield "## Data"
    yield ""
    for path in dict.fromkeys((sources.params.data.train_file, sources.params.data.test_file)):
        yield f"- {_code(path)}, md5 `{next(entry.md5 for entry in sources.entries if entry.path == path)}`"
    for path, record in sources.raw.items():
        yield (
            f"- {_code(path)}: {_link(str(record['repo_id']), 'datasets/')} at commit {_code(str(record['revision']))}, "
            f"licence {in_markdown(str(record.get('license') or 'not stated'))}, {len(record['files'])} files, sha256 over their sums "
            f"`{hashlib.sha256(json.dumps(record['files'], sort_keys=True).encode()).hexdigest()}`"
        )
    yield from _rows(prepared)
    yield from _tokens(trained)
    near = prepared.get("near")
    yield ""
    yield (
        f"Duplicates among the train rows: {prepared['duplicates']:,}. Test prompts found in the train file: {prepared['leakage']['test_rows']:,}. "
        + (
            f"Near duplicates: {near['duplicates']:,}, nearly leaked test rows: {near['leaked_test_rows']:,} (of {near['compared']:,} compared)."
            if near
            else "Near duplicates were not looked for."
        )
    )


def _rows(prepared: Mapping[str, Any]) -> Iterator[str]:
    yield ""
    yield "What became of every row:"
    yield ""
    yield from _table(
        ("split", "rows in", "dropped", "conversations", "answers"),
        (
            (split, f"{row['rows_in']:,}", _reasons(row["dropped"]), f"{row['rows_out']:,}", f"{row['assistant_turns']:,}")
            for split in ("train", "validation", "test")
            for row in [prepared[split]]
        ),
    )


def _tokens(trained: Mapping[str, Any]) -> Iterator[str]:
    yield ""
    yield "What became of every token:"
    yield ""
    yield from _table(
        ("split", "tokens in", "dropped", "truncated", "repeated", "trained on", "supervised", "conversations dropped"),
        (
            (
                split,
                *(f"{row['tokens'][name]:,}" for name in ("in", "dropped", "truncated", "repeated", "out", "supervised")),
                _reasons(row["conversations"]["dropped"]),
            )
            for split in ("train", "validation")
            if split in trained
            for row in [trained[split]]
        ),
    )


def _training(sources: Sources) -> Iterator[str]:
    record = sources.reports["train"]
    yield "## Training"
    yield ""
    losses = ", ".join(f"{name} loss {row['last']:.4f} (least {row['min']:.4f})" for name, row in sorted(record["loss"].items(), reverse=True))
    yield f"{record['steps']:,} updates, of which the adapter is number {record['published_step']:,}; {losses}, in nats a token."
    # One whose comparison did not end has no numbers.
    if sources.found.get("merge", {}).get("accepted") is not None:
        yield ""
        yield from _merge(sources.found["merge"])
    yield ""
    yield "Made with:"
    yield ""
    facts = {stage: flat(row) for stage, row in sources.environment.items()}
    yield from _table(
        ("", *facts),
        ((name, *(_shown(row.get(name)) for row in facts.values())) for name in sorted({name for row in facts.values() for name in row})),
    )


def _merge(record: Mapping[str, Any]) -> Iterator[str]:
    if not record["accepted"]:
        mean = "not finite" if record["kl_mean"] is None else f"{record['kl_mean']:.3g}"
        yield (
            f"A merge into the base model in {record['ran_on']['merged']['dtype']} was refused: KL {mean} nats per token, "
            f"allowed were {record['max_kl']}."
        )
        return
    yield (
        f"Merged into the base model in {record['ran_on']['merged']['dtype']} (`python -m tools.merge`): KL {record['kl_mean']:.3g} nats per token, "
        f"{record['kl_max']:.3g} at most; likeliest token equal at {record['argmax_agreement']:.2%} of {record['tokens']:,} tokens, greedy answers "
        f"the same {record['answers_equal']:.2%} of {record['answers']:,}; nll {record['nll_adapter']:.6f}, merged {record['nll_merged']:.6f}."
    )


def _shown(value: Any) -> str:
    return "" if value is None else str(value).lower() if isinstance(value, bool) else in_markdown(str(value))


def _not_tested(sources: Sources) -> Iterator[str]:
    yield "## What was not tested"
    yield ""
    for line in untested(sources):
        yield f"- {line}"


def untested(sources: Sources) -> Iterator[str]:
    """What a reader might take for granted and no number here shows."""
    values, counts = sources.params, sources.reports["evaluation"]["tuned"]["counts"]
    yield "Safety, bias, and facts beyond the test set: nothing here measures them."
    if "benchmark" not in sources.found:
        yield "What the fine-tuning cost the base model elsewhere: no standard benchmark was run on this adapter (`python -m tools.benchmark`)."
    yield f"Another seed: this is one training, with seed {values.train.seed}."
    if not values.predict.do_sample:
        yield "Sampled answers: all were greedy."
    elif len(values.predict.generation_seeds) == 1:
        yield "Other draws: each answer was sampled once."
    if left := counts["conversations"] - _measured(counts):
        # Those that params left out, before those that could not be measured.
        ordered = dict.fromkeys(("not_chosen", *LEFT_OUT))
        reasons = ", ".join(f"{counts[reason]:,} {LEFT_OUT[reason]}" for reason in ordered if counts[reason])
        yield f"{left:,} of {counts['conversations']:,} test conversations: {reasons}."
    if values.predict.turns == "last":
        yield "Answers before the last of each conversation."
    few = [
        f"{in_markdown(name)} ({row['turns']})"
        for name, row in sources.reports["evaluation"]["tuned"]["by_category"].items()
        if row["turns"] < FEW_TURNS
    ]
    if few:
        yield f"Categories with fewer than {FEW_TURNS} answers, of which single numbers say little: {', '.join(few)}."
    near = sources.reports["prepare"].get("near")
    if near and near["too_short"]:
        yield f"Near duplicates among {near['too_short']:,} rows that are too short to be compared."
    if not sources.found.get("merge", {}).get("accepted"):
        yield "The adapter merged into its base model (`python -m tools.merge`)."
    if values.base_model.is_quantised:
        bits = 4 if values.base_model.load_in_4bit else 8
        yield f"The adapter on a base model in another precision than the {bits} bits that it was trained on, but for what is said of merging."
    yield f"Other hardware than {values.hardware.device}, and other versions of the packages."


def _reproduction(sources: Sources) -> Iterator[str]:
    yield "## Reproduction"
    yield ""
    record = sources.found.get("reproduction")
    if not record:
        yield "Not proven: `python -m tools.verify --rerun` builds everything again and compares every byte."
        return
    same = sum(output["identical"] for output in record["outputs"].values())
    yield (
        f"Built again in a clone with an empty cache: {', '.join(record['stages'])}; {same} of {len(record['outputs'])} outputs are the same byte "
        f"for byte. Verdict: {record['verdict']}."
    )
    for stage, causes in record["causes"].items():
        yield f"- another environment of {stage}: {in_markdown('; '.join(causes))}"


def _chain(sources: Sources) -> Iterator[str]:
    yield "## Hash chain"
    yield ""
    yield f"From raw data to adapter, as dvc.lock of commit `{sources.commit}` has it (md5):"
    yield ""
    for stage in sources.stages:
        read = [entry for entry in stage.entries if not entry.is_output and not _is_code(entry)]
        written = [entry for entry in stage.entries if entry.is_output]
        yield f"- **{stage.name}** reads " + ", ".join(map(_hashed, read))
        yield "  and writes " + ", ".join(map(_hashed, written))
    yield ""
    yield (
        f"Base model {_code(sources.params.base_model.name)}"
        + (f", {in_markdown(sources.base.repo_id)} at {_code(str(sources.base.revision))}" if sources.base.repo_id else "")
        + ":"
    )
    yield ""
    yield from _table(
        ("file", "bytes", "sha256"), ((in_markdown(name), f"{row['bytes']:,}", _code(row["sha256"])) for name, row in sources.base.files.items())
    )
    yield ""
    yield "<details><summary>Code and packages that ran (md5)</summary>"
    yield ""
    for stage in sources.stages:
        yield f"- **{stage.name}**: `{stage.command}`; " + ", ".join(_hashed(entry) for entry in stage.entries if _is_code(entry))
    yield ""
    yield "</details>"


def _is_code(entry: Recorded) -> bool:
    return not entry.is_output and entry.path.startswith(("qlora/", "stages/", "requirements"))


def _hashed(entry: Recorded) -> str:
    return f"{in_markdown(entry.path)} {_code(entry.md5)}"


def _params(sources: Sources) -> Iterator[str]:
    yield "## Every param"
    yield ""
    yield "<details><summary>params.yaml</summary>"
    yield ""
    yield "```json"
    yield json.dumps(sources.params.model_dump(mode="json"), indent=2, ensure_ascii=False)
    yield "```"
    yield ""
    yield "</details>"


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(heads)} |"
    yield f"|{'---|' * len(heads)}"
    for row in rows:
        yield f"| {' | '.join(row)} |"


def _number(value: float | None) -> str:
    return "not defined" if value is None else f"{value:.4f}"


def _interval(row: Mapping[str, float | None]) -> str:
    return "not defined" if row["low"] is None else f"{_signed(row['low'])} to {_signed(row['high'])}"


def _signed(value: float | None) -> str:
    return "not defined" if value is None else f"{value:+.4f}"


def _reasons(dropped: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in dropped.items() if count) or "none"
