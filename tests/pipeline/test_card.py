"""The model card says what dvc.lock, params, metrics and manifests say, and nothing else."""

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from qlora.core.dvc_lock import recorded_outputs
from qlora.core.hashing import sha256_of
from qlora.delivery.card import render, untested
from qlora.delivery.card.sources import Sources, changed_outputs, read_sources
from qlora.delivery.reproduction import changed_inputs, read_environment
from qlora.params import Params
from tests.pipeline.clone import Clone
from tests.unit.test_foreign_text import HOSTILE, rendered

CARD = "reports/model_card.md"


def leaves(record: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    parts = record.items() if isinstance(record, dict) else enumerate(record) if isinstance(record, list) else None
    if parts is None:
        yield path
    else:
        for name, part in parts:
            yield from leaves(part, (*path, name))


def with_other(record: Any, path: tuple[Any, ...]) -> Any:
    """A copy in which the value at the path is another one of its kind."""
    if not path:
        return other(record)
    copied = record.copy()
    copied[path[0]] = with_other(copied[path[0]], path[1:])
    return copied


def other(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + type(value)(1)
    return f"{value}0"


@pytest.fixture
def sources(inside: Clone) -> Sources:
    return read_sources(read_environment())


def test_the_card_is_written_checked_and_valid_for_the_hub(inside: Clone) -> None:
    assert "[card-missing]" in inside.run("python", "-m", "tools.card", "--check", fails=True)
    inside.run("python", "-m", "tools.card")
    assert inside.run("python", "-m", "tools.card", "--check") == f"{CARD} says what is computed\n"
    text = Path(CARD).read_text(encoding="utf-8")
    card = ModelCard(text)
    evaluation: Any = inside.json("reports/evaluation.json")
    tuned = evaluation["tuned"]
    defined = {name: tuned[name] for name in evaluation["difference"] if tuned[name] is not None}
    assert (card.data.license, card.data.library_name, card.data.pipeline_tag) == ("apache-2.0", "peft", "text-generation")
    assert {result.metric_type: result.metric_value for result in card.data.eval_results} == {
        name: round(value, 6) for name, value in defined.items() if name not in ("answer_tokens", "length_ratio")
    }
    for md5 in recorded_outputs().values():
        assert f"`{md5}`" in text
    assert "Not proven" in text
    assert "- Another seed: this is one training, with seed 42." in text
    # A later commit of something else changes nothing, nor does another environment that a later run noted.
    inside.commit("the card")
    assert inside.json("reports/environment.json") == inside.json("metrics/environment.json")
    noted = Path("metrics/environment.json")
    noted.write_text(noted.read_text(encoding="utf-8").replace('"python": "', '"python": "other '), encoding="utf-8")
    inside.run("python", "-m", "tools.card", "--check")
    listed = inside.run("python", "-m", "tools.publish", "--repo-id", "org/name", "--dry-run")
    assert all(name in listed for name in ("README.md", "LICENSE", "adapter_model.safetensors"))
    # A card that was edited is named by its lines.
    edited = text.replace(f"`{tuned['counts']['turns']:,}", "`").replace("LoRA of rank 16", "LoRA of rank 61")
    Path(CARD).write_text(edited, encoding="utf-8")
    output = inside.run("sh", "-c", "python -m tools.card --check; echo status $?")
    assert "[card-differs]" in output
    assert "-LoRA of rank 61" in output
    assert "+LoRA of rank 16" in output
    assert "status 2" in output


def test_every_changed_number_is_seen(sources: Sources) -> None:
    tried = 0
    for path in (Path("metrics/evaluate.json"), *(Path(f"reports/{name}.json") for name in sources.reports)):
        written = path.read_text(encoding="utf-8")
        record = json.loads(written)
        (entry,) = [entry for entry in sources.entries if entry.path == str(path) and entry.is_output]
        for leaf in leaves(record):
            path.write_text(json.dumps(with_other(record, leaf), indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
            assert list(changed_outputs([entry])), (path, leaf)
            tried += 1
        path.write_text(written, encoding="utf-8")
        assert not list(changed_outputs([entry]))
    assert tried > 300


@pytest.mark.parametrize("text", HOSTILE)
def test_text_of_others_marks_up_nothing(sources: Sources, text: str) -> None:
    """A licence from the Hub, a category of a row, a file's name: the card has the tags that it has with plain words."""

    def tags(shown: str) -> list[str]:
        evaluation, (category, *_) = sources.reports["evaluation"], sources.reports["evaluation"]["tuned"]["by_category"]
        rows = {shown: evaluation["tuned"]["by_category"][category]}
        fetched = {"repo_id": "org/name", "revision": shown, "license": shown, "files": {}}
        changed = dataclasses.replace(
            sources,
            reports={**sources.reports, "evaluation": {**evaluation, "tuned": {**evaluation["tuned"], "by_category": rows}}},
            raw={f"data/raw/{shown}": fetched},
            base=dataclasses.replace(sources.base, repo_id="org/base", revision=shown, files={shown: {"bytes": 1, "sha256": shown}}),
            base_license=shown,
        )
        return [tag for tag in rendered(render(changed).partition("\n---\n\n")[2]).tags if tag != "code"]

    assert tags(text.encode("utf-8", "replace").decode()) == tags("plain")


def test_a_score_that_is_not_defined_is_said_to_be_so_and_is_no_result_of_the_hub(sources: Sources) -> None:
    evaluation = sources.reports["evaluation"]
    unlike = dict.fromkeys(evaluation["difference"]["exact_match"])
    changed = {
        "base": evaluation["base"],
        "tuned": {**evaluation["tuned"], "exact_match": None},
        "difference": {**evaluation["difference"], "exact_match": unlike},
    }
    text = render(dataclasses.replace(sources, reports={**sources.reports, "evaluation": changed}))
    base = evaluation["base"]["exact_match"]
    assert f"| `exact_match` | {base:.4f} | not defined | not defined | not defined |" in text
    assert "exact_match" not in {result.metric_type for result in ModelCard(text).data.eval_results}


def test_every_changed_hash_is_seen(sources: Sources) -> None:
    """Of dvc.lock, whether the file lies here or not, of the base model and of fetched data."""
    text, tried = render(sources), 0
    for stage in sources.stages:
        for entry in stage.entries:
            changed = entry._replace(md5=other(entry.md5))
            alone = dataclasses.replace(stage, entries=[changed], dependencies=frozenset() if entry.is_output else frozenset([entry.path]))
            assert [*changed_inputs([alone]), *changed_outputs([changed])], entry
            entries = [changed if one == entry else one for one in stage.entries]
            stages = [dataclasses.replace(one, entries=entries) if one.name == stage.name else one for one in sources.stages]
            assert render(dataclasses.replace(sources, stages=stages)) != text, entry
            tried += 1
    for leaf in leaves(sources.base.files):
        base = dataclasses.replace(sources.base, files=with_other(sources.base.files, leaf))
        assert render(dataclasses.replace(sources, base=base)) != text, leaf
        tried += 1
    raw = {
        "data/raw/mine.source.json": {
            "repo_id": "org/mine",
            "revision": "a" * 40,
            "license": "mit",
            "files": {"a.parquet": {"bytes": 1, "sha256": "b"}},
        }
    }
    fetched = dataclasses.replace(sources, raw=raw)
    for leaf in leaves(raw):
        assert render(dataclasses.replace(fetched, raw=with_other(raw, leaf))) != render(fetched), leaf
    pinned = dataclasses.replace(sources, base=dataclasses.replace(sources.base, repo_id="org/base", revision="c" * 40), base_license="llama3")
    assert f"at commit `{'c' * 40}`, licence llama3" in render(pinned)
    assert "[org/base](https://huggingface.co/org/base)" in render(pinned)
    assert ModelCard(render(pinned)).data.base_model == "org/base"
    assert ModelCard(render(fetched)).data.datasets == ["org/mine"]
    assert tried > 100


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")  # a null becomes a text, which not every param may be
def test_every_changed_param_environment_and_word_is_seen(sources: Sources) -> None:
    text, tried = render(sources), 0
    values = sources.params.model_dump()
    for section, key in ((path[0], path[1]) for path in leaves(values)):
        # One of its values is a boolean, and the others are words.
        new = "pissa" if key == "init_lora_weights" else other(values[section][key])
        part = getattr(sources.params, section).model_copy(update={key: new})
        changed: Params = sources.params.model_copy(update={section: part})
        # A path that is not in dvc.lock is refused before anything is rendered.
        if key not in ("train_file", "test_file"):
            assert render(dataclasses.replace(sources, params=changed)) != text, (section, key)
        tried += 1
    for leaf in leaves(dict(sources.environment)):
        assert render(dataclasses.replace(sources, environment=with_other(dict(sources.environment), leaf))) != text, leaf
        tried += 1
    for name in ("license", "language", "intended_use"):
        by_hand = sources.by_hand.model_copy(update={name: ["xx"] if name == "language" else "something else"})
        assert render(dataclasses.replace(sources, by_hand=by_hand)) != text, name
    assert render(dataclasses.replace(sources, commit="f" * 40)) != text
    assert tried > 100


def test_what_was_run_on_this_adapter_is_in_the_card_and_what_was_run_on_another_is_not(inside: Clone) -> None:
    def benchmark(adapter: str) -> str:
        record = {"base": {"t": {"acc": 0.25}}, "tuned": {"t": {"acc": 0.5}}, "delta": {"t": {"acc": 0.25}}}
        ran_on = {"adapter": {"dvc_md5": adapter}}
        Path("metrics/benchmark.json").write_text(json.dumps({**record, "ran_on": ran_on}), encoding="utf-8")
        inside.commit("benchmark")
        return render(read_sources(read_environment()))

    assert "| t | acc | 0.2500 | 0.5000 | +0.2500 |" in benchmark(recorded_outputs()["models/adapter"])
    assert "no standard benchmark was run on this adapter" in benchmark("0" * 32)


def test_a_merge_that_was_refused_is_no_merge(sources: Sources) -> None:
    refused = {"accepted": False, "kl_mean": 7.5, "max_kl": 0.005, "ran_on": {"merged": {"dtype": "bfloat16"}}}
    text = render(dataclasses.replace(sources, found={"merge": refused}))
    assert "was refused: KL 7.5 nats per token, allowed were 0.005" in text
    assert "The adapter merged into its base model" in text
    overflowed = render(dataclasses.replace(sources, found={"merge": {**refused, "kl_mean": None}}))
    assert "was refused: KL not finite" in overflowed


def test_a_merge_that_was_not_compared_is_no_merge(sources: Sources) -> None:
    kept = {"accepted": None, "compared": False, "ran_on": {"merged": {"dtype": "bfloat16"}}}
    text = render(dataclasses.replace(sources, found={"merge": kept}))
    assert "The adapter merged into its base model" in text
    assert "KL" not in text


def test_a_card_needs_neither_weights_nor_raw_data_nor_adapter_and_refuses_a_false_origin(inside: Clone, tmp_path: Path) -> None:
    # Git does not track a link in place of the embedded model's folder.
    shutil.move("models/base/tiny", tmp_path / "weights")
    Path("models/base/tiny").symlink_to(tmp_path / "weights", target_is_directory=True)
    shutil.move("data/raw/micro", "data/raw/fetched")
    inside.run("git", "rm", "--quiet", "--cached", "-r", "data/raw/micro")
    inside.run("dvc", "add", "--quiet", "data/raw/fetched")
    files = {path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)} for path in Path("data/raw/fetched").iterdir()}
    manifest = Path("data/raw/fetched.source.json")
    manifest.write_text(json.dumps({"repo_id": "org/fetched", "revision": "a" * 40, "license": "mit", "files": files}), encoding="utf-8")
    inside.set(data__train_file="data/raw/fetched/train.jsonl", data__test_file="data/raw/fetched/test.jsonl")
    assert inside.repro() == {"prepare"}
    inside.commit("weights and data elsewhere")
    inside.run("python", "-m", "tools.card")
    inside.commit("the card")
    assert "org/fetched" in Path(CARD).read_text(encoding="utf-8")
    inside.run("git", "clone", "--quiet", str(inside.path), str(tmp_path / "bare"))
    bare = Clone(tmp_path / "bare")
    for absent in ("models/base/tiny", "models/adapter", "data/raw/fetched", "data/prepared", "metrics/environment.json"):
        assert not (bare.path / absent).exists(), absent
    assert "says what is computed" in bare.run("python", "-m", "tools.card", "--check")

    manifest.write_text(manifest.read_text(encoding="utf-8").replace(files["train.jsonl"]["sha256"], "0" * 64), encoding="utf-8")
    inside.commit("a false origin")
    assert "train.jsonl: not what data/raw/fetched.source.json says was fetched" in inside.run("python", "-m", "tools.card", "--check", fails=True)


def test_what_limits_the_measurement_is_said(sources: Sources) -> None:
    def said(**changes: Any) -> str:
        return "\n".join(untested(dataclasses.replace(sources, **changes)))

    evaluation = sources.reports["evaluation"]
    tuned = evaluation["tuned"]
    assert "Categories with fewer than 30 answers" in said()
    few = {**tuned, "counts": {**tuned["counts"], "not_chosen": 3, "too_long": 2}}
    assert "5 of 8 test conversations: 3 not chosen" in said(reports={**sources.reports, "evaluation": {**evaluation, "tuned": few}})
    drawn = sources.params.model_copy(update={"predict": sources.params.predict.model_copy(update={"do_sample": True, "turns": "last"})})
    assert "each answer was sampled once" in said(params=drawn)
    assert "Answers before the last" in said(params=drawn)


def test_a_card_of_what_does_not_belong_together_is_refused(inside: Clone, tmp_path: Path) -> None:
    inside.set(runtime__progress=False)
    assert "[card-uncommitted]" in inside.run("python", "-m", "tools.card", fails=True)
    inside.set(train__seed=5)
    output = inside.run("sh", "-c", "python -m tools.card; echo status $?")
    assert "[card-stale]" in output
    assert "train.seed is 5" in output
    assert "status 2" in output
    inside.run("git", "checkout", "--", "params.yaml")
    kept = Path("models/card.yaml").read_text(encoding="utf-8")
    Path("models/card.yaml").write_text("license: mit\n", encoding="utf-8")
    assert "[card-by-hand]" in inside.run("python", "-m", "tools.card", fails=True)
    Path("models/card.yaml").write_text(kept, encoding="utf-8")
    inside.commit("another")
    inside.run("git", "clone", "--quiet", "--depth", "1", f"file://{inside.path}", str(tmp_path / "shallow"))
    assert "[card-shallow]" in Clone(tmp_path / "shallow").run("python", "-m", "tools.card", fails=True)
    noted = Path("metrics/environment.json")
    noted.write_text(json.dumps({name: row for name, row in json.loads(noted.read_bytes()).items() if name == "evaluate"}), encoding="utf-8")
    assert "[card-environment] the environment of prepare, baseline, train, predict was not" in inside.run("python", "-m", "tools.card", fails=True)
    assert not (inside.path / CARD).exists()
