"""Files that others wrote, in every kind of damage: read, or refused in one message that names them. benchmarks/fuzz_models.py tries 20,000 more."""

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ruamel.yaml import YAML
from safetensors.torch import load_file, save_file

from benchmarks.fuzz_models import FRAGMENTS
from qlora import params
from qlora.core import dvc_lock
from qlora.core.conversation import Conversation, Message, read_conversations
from qlora.core.errors import InputError, MachineError, UserFacingError
from qlora.delivery.card.sources import read_by_hand
from qlora.model import rendering
from qlora.model.adapter import load_adapter
from qlora.model.chat_template import ChatTemplate
from qlora.model.config import load_config, load_tokenizer
from qlora.model.loading import load_model, stop_token_ids
from qlora.model.manifest import check_vocabulary, read_manifest
from qlora.training.lora import adapter_model
from qlora.training.memory import estimate
from tools import pin, recipes

ROOT = Path(__file__).parents[2]
BASE = ROOT / "models/base/tiny"
CPU = torch.device("cpu")
DAMAGE: dict[str, bytes] = {
    "empty": b"",
    "NUL": b"\0" * 64,
    "a word": b"hello",
    "not UTF-8": '{"files": "é"}'.encode("latin-1"),
    "a list": b"[1]",
    "a number": b"3",
    "null": b"null",
    "an empty object": b"{}",
    "deep lists": b"[" * 100_000 + b"]" * 100_000,
    "deep objects": b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
    "beyond floats": b'{"files": {"a": {"bytes": 1e999, "sha256": "x"}}, "hidden_size": 1e999, "vocab_size": 1e999, "r": 1e999}',
    "5,000 digits": b'{"hidden_size": ' + b"9" * 5000 + b', "files": ' + b"9" * 5000 + b"}",
    "a lone surrogate": b'{"model_type": "\\ud800", "files": {"\\ud800": {"bytes": 1, "sha256": "x"}}}',
    "stages: 3": b"stages: 3",
    "a stage that is a number": b"stages:\n  train: 3",
    "deps that are a number": b"stages:\n  train:\n    cmd: x\n    deps: 3\n    outs: 3",
    "a path for an md5": b"stages:\n  train:\n    cmd: x\n    outs:\n      - path: a\n        md5: ../../../x\n",
    "an anchor in itself": b"a: &a [*a]",
    "a Python object": b"!!python/object:os.system x",
    "half a section": b"[cache\n",
    "no section": b"dir = x",
    "a key twice": b"[cache]\ndir = x\ndir = y\n",
}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Libraries log what stands in the files, such as lone surrogates, which a test's worker can't hand on."""
    logging.disable()
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture(scope="module")
def values() -> params.Params:
    return params.load(ROOT / "params.yaml")


@pytest.fixture(scope="module")
def good_adapter(values: params.Params, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new adapter as PEFT saves it."""
    folder = tmp_path_factory.mktemp("adapter")
    adapter_model(values, BASE, CPU).save_pretrained(folder)
    record = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    record |= {"base_model_name_or_path": "models/base/tiny", "target_modules": sorted(record["target_modules"])}
    (folder / "adapter_config.json").write_text(json.dumps(record), encoding="utf-8")
    return folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(BASE, tmp_path / "model"))


def outcome(action: Callable[[], object]) -> str:
    """The code by which it was refused, or "read"; anything else fails the test."""
    try:
        action()
    except UserFacingError as error:
        return error.code
    return "read"


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"])
def test_files_of_a_base_model(model: Path, values: params.Params, name: str, damage: str) -> None:
    (model / name).write_bytes(DAMAGE[damage])
    found = {
        outcome(lambda: check_vocabulary(model)),
        outcome(lambda: ChatTemplate(load_tokenizer(model), values.chat)),
        outcome(lambda: load_config(model)),
        outcome(lambda: load_model(values.base_model, model, CPU, progress=False)),
        outcome(lambda: pin.require_loadable(model)),
    }
    if name in ("config.json", "tokenizer.json"):
        assert found - {"read"}


@pytest.mark.parametrize("damage", DAMAGE)
def test_weights(model: Path, values: params.Params, damage: str) -> None:
    (model / "model.safetensors").write_bytes(DAMAGE[damage])
    assert outcome(lambda: pin.require_loadable(model)) == "base-model-unloadable"
    assert outcome(lambda: load_model(values.base_model, model, CPU, progress=False)) == "base-model-unloadable"


def header(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        content = path.read_bytes()
        size = int.from_bytes(content[:8], "little")
        record = json.loads(content[8 : 8 + size])
        text = json.dumps(change(record) or record).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])

    return write


def first(**entry: object) -> Callable[[Path], None]:
    """The first tensor, described otherwise."""
    return header(lambda record: record[next(iter(sorted(record.keys() - {"__metadata__"})))].update(entry))


LIES: dict[str, Callable[[Path], None]] = {
    "an unknown type": first(dtype="F99"),
    "a type of another size": first(dtype="F64"),
    "a shape of more numbers": first(shape=[10**6, 10**6]),
    "a negative shape": first(shape=[-1, 4]),
    "a shape beyond 64 bits": first(shape=[2**63, 2**63]),
    "offsets beyond the file": first(data_offsets=[0, 2**62]),
    "offsets backwards": first(data_offsets=[64, 0]),
    "negative offsets": first(data_offsets=[-64, 0]),
    "a tensor that is a number": header(lambda record: {**record, "x": 3}),
    "a tensor over another": first(data_offsets=[0, 8]),
    "a header that is a list": header(lambda record: [record]),
    "no tensors": header(lambda _: {"a": {}}),
    "a length beyond the file": lambda path: path.write_bytes((2**40).to_bytes(8, "little") + path.read_bytes()[8:]) and None,
    "a length of nearly 2^64": lambda path: path.write_bytes((2**64 - 1).to_bytes(8, "little") + path.read_bytes()[8:]) and None,
    "half of the file": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]) and None,
}


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_lies_is_not_pinned(model: Path, values: params.Params, lie: str) -> None:
    LIES[lie](model / "model.safetensors")
    assert outcome(lambda: pin.require_loadable(model)) == "base-model-unloadable"
    assert outcome(lambda: load_model(values.base_model, model, CPU, progress=False)) == "base-model-unloadable"


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_files_of_an_adapter(good_adapter: Path, values: params.Params, tmp_path: Path, name: str, damage: str) -> None:
    folder = Path(shutil.copytree(good_adapter, tmp_path / "adapter"))
    (folder / name).write_bytes(DAMAGE[damage])
    base = load_model(values.base_model, BASE, CPU, progress=False)
    assert outcome(lambda: load_adapter(base, folder, "tiny")) == "adapter-unloadable"


@pytest.mark.parametrize(
    ("key", "value"),
    [("target_modules", "(["), ("target_modules", 3), ("r", -1), ("r", "x"), ("peft_type", "X"), ("rank_pattern", {"([": 3}), ("layers_pattern", 3)],
    ids=str,
)
def test_values_of_an_adapter_s_config(good_adapter: Path, values: params.Params, tmp_path: Path, key: str, value: object) -> None:
    folder = Path(shutil.copytree(good_adapter, tmp_path / "adapter"))
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), key: value}), encoding="utf-8")
    base = load_model(values.base_model, BASE, CPU, progress=False)
    assert outcome(lambda: load_adapter(base, folder, "tiny")) in ("adapter-unloadable", "read")


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
def test_an_adapter_that_lacks_a_weight_is_none(good_adapter: Path, values: params.Params, tmp_path: Path) -> None:
    """PEFT would warn, and leave that weight as it was made."""
    folder = Path(shutil.copytree(good_adapter, tmp_path / "adapter"))
    weights = load_file(folder / "adapter_model.safetensors")
    gone = sorted(weights)[0]
    save_file({name: weight for name, weight in weights.items() if name != gone}, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=rf"\[adapter-unloadable\].*lacks 1 weights, such as {gone}"):
        load_adapter(load_model(values.base_model, BASE, CPU, progress=False), folder, "tiny")


def test_layers_that_the_model_does_not_have(values: params.Params) -> None:
    changed = values.model_copy(update={"lora": values.lora.model_copy(update={"target_modules": ["nowhere"]})})
    for action in (lambda: adapter_model(changed, BASE, CPU), lambda: estimate(changed, load_config(BASE))):
        with pytest.raises(InputError, match=r"\[lora-layers\].*nowhere.*change lora.target_modules"):
            action()


@pytest.mark.parametrize("ends", ["x", -1, 10**9, 1.5, [[1]], [None, "x"], True], ids=str)
def test_tokens_that_end_answers_must_be_tokens(model: Path, values: params.Params, ends: object) -> None:
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}), encoding="utf-8")
    assert (
        outcome(lambda: stop_token_ids(load_model(values.base_model, model, CPU, progress=False), load_tokenizer(BASE), []))
        == "base-model-unloadable"
    )


@pytest.mark.parametrize("fragment", FRAGMENTS)
def test_templates(model: Path, values: params.Params, fragment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendering, "MOST_SECONDS", 1)
    path = model / "chat_template.jinja"
    good = path.read_text(encoding="utf-8")
    for text in (fragment, fragment + good, good + fragment):
        path.write_text(text, encoding="utf-8")
        outcome(lambda: ChatTemplate(load_tokenizer(model), values.chat))


ENDLESS = "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}"


def test_a_template_that_does_not_end_is_refused_and_the_timer_is_stopped(
    model: Path, values: params.Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    import signal

    monkeypatch.setattr(rendering, "MOST_SECONDS", 1)
    before = signal.getsignal(signal.SIGPROF)
    (model / "chat_template.jinja").write_text(ENDLESS, encoding="utf-8")
    for action in (lambda: ChatTemplate(load_tokenizer(model), values.chat), lambda: pin.require_loadable(model)):
        with pytest.raises(InputError, match=r"\[chat-endless\]"):
            action()
    assert signal.getitimer(signal.ITIMER_PROF) == (0.0, 0.0)
    assert signal.getsignal(signal.SIGPROF) is before


def test_a_template_is_named_where_it_needs_a_param(model: Path) -> None:
    (model / "chat_template.jinja").write_text("{{ strftime_now('%Y') }}" + (model / "chat_template.jinja").read_text(encoding="utf-8"))
    assert "today's date" in (pin.require_loadable(model) or "")
    assert pin.require_loadable(BASE) is None


READERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "manifest": (read_manifest, "base-model-manifest"),
    "lock": (dvc_lock.recorded, "lock-damaged"),
    "pipeline": (dvc_lock.outputs_in_git, "pipeline-damaged"),
    "params": (params.load, "params-syntax"),
    "params as DVC reads them": (dvc_lock.params_values, "params-syntax"),
    "recipe": (lambda path: (recipes.summary(path), recipes.compose(ROOT / "params.yaml", path)), "params-syntax"),
    "texts of the card": (read_by_hand, "card-by-hand"),
    "conversations": (read_conversations, "prepared-unreadable"),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", READERS)
def test_files_of_the_repository(tmp_path: Path, name: str, damage: str) -> None:
    read, code = READERS[name]
    path = tmp_path / "file"
    path.write_bytes(DAMAGE[damage])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        found = outcome(lambda: read(path))
    assert found in (code, "read", "params-invalid", "recipe-key", "recipe-unreadable")


@pytest.mark.parametrize(
    ("name", "damage"), [("manifest", "beyond floats"), ("lock", "a path for an md5"), ("pipeline", "stages: 3"), ("recipe", "empty")]
)
def test_what_once_was_a_traceback_is_refused(tmp_path: Path, name: str, damage: str) -> None:
    read, code = READERS[name]
    (tmp_path / "file").write_bytes(DAMAGE[damage])
    assert outcome(lambda: read(tmp_path / "file")) == code


def test_a_recipe_that_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(DAMAGE["not UTF-8"])
    with pytest.raises(InputError, match=r"\[recipe-unreadable\] .*file can't be read"):
        recipes.summary(tmp_path / "file")


@pytest.mark.parametrize(
    "changed",
    [
        {"files": {"../x": {"bytes": 1, "sha256": "x"}}},
        {"files": {}, "repo_id": 3},
        {"files": {}, "revision": "main"},
    ],
    ids=str,
)
def test_a_manifest_names_files_of_its_folder_and_a_commit(tmp_path: Path, changed: dict[str, object]) -> None:
    (tmp_path / "m.json").write_text(json.dumps(changed), encoding="utf-8")
    assert outcome(lambda: read_manifest(tmp_path / "m.json")) == "base-model-manifest"


@pytest.mark.parametrize("damage", DAMAGE)
def test_the_configuration_of_dvc(tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".dvc").mkdir()
    (tmp_path / ".dvc/config").write_bytes(DAMAGE[damage])
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    found = outcome(dvc_lock.cache_folder)
    assert found in ("dvc-config", "read")
    assert found == "dvc-config" or damage not in ("half a section", "no section", "a key twice", "not UTF-8")


def test_a_value_that_dvc_yaml_asks_for_and_params_yaml_lacks() -> None:
    with pytest.raises(InputError, match=r"\[params-invalid\] params.yaml lacks a value of \$\{data.nowhere\}"):
        dvc_lock.resolved("${data.nowhere}", YAML(typ="safe").load("data: {}"))


def test_a_config_of_a_model_without_end_is_refused_at_once(model: Path) -> None:
    record = json.loads((model / "config.json").read_text(encoding="utf-8"))
    (model / "config.json").write_text(json.dumps({**record, "num_hidden_layers": 2**31}), encoding="utf-8")
    with pytest.raises(InputError, match=r"\[base-model-unloadable\].*num_hidden_layers is 2147483648"):
        load_config(model)


def test_a_model_s_own_tokens_are_no_text(values: params.Params) -> None:
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=9))
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id="x"), config=config)
    with pytest.raises(InputError, match="'x', which is not one of the base model's 9 tokens"):
        stop_token_ids(model, SimpleNamespace(eos_token_id=None), [])


@pytest.mark.parametrize("text", ["{{ (9**(9**9)) % 7 }}", "{% if (9**(9**9)) > 1 %}x{% endif %}", ENDLESS])
def test_an_endless_constant_ends_too(model: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Jinja computes constants once, and ignores every Exception meanwhile."""
    monkeypatch.setattr(rendering, "MOST_SECONDS", 1)
    (model / "chat_template.jinja").write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=r"\[chat-endless\]"):
        pin.require_loadable(model)


@pytest.mark.parametrize("raised", [MemoryError(), OSError(24, "Too many open files")], ids=repr)
def test_a_lack_of_memory_drops_no_conversation(values: params.Params, raised: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    template = ChatTemplate(load_tokenizer(BASE), values.chat, on_invalid="drop")

    def fail(*_: object, **__: object) -> None:
        raise raised

    monkeypatch.setattr(rendering, "render_jinja_template", fail)
    turns = [Message(role="user", content="a"), Message(role="assistant", content="b")]
    with pytest.raises((MemoryError, MachineError)):
        template.encode(Conversation("1", "", turns))


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_embeddings_with_an_adapter_are_no_obstacle(values: params.Params) -> None:
    lora = values.lora.model_copy(update={"target_modules": ["q_proj", "embed_tokens"]})
    model = adapter_model(values.model_copy(update={"lora": lora}), BASE, CPU)
    assert stop_token_ids(model, load_tokenizer(BASE), [1]) == sorted({1, *stop_token_ids(model, load_tokenizer(BASE), [])})


def test_memory_that_runs_out_while_weights_are_quantised_is_said(values: params.Params, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers logs it in a report, and raises another error."""

    def fail(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr("transformers.integrations.bitsandbytes.Bnb4bitQuantize.convert", fail)
    logging.disable(logging.NOTSET)
    base = values.base_model.model_copy(update={"load_in_4bit": True})
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        load_model(base, BASE, CPU, progress=False)


def test_half_a_character_of_a_template_is_refused(model: Path, values: params.Params) -> None:
    (model / "chat_template.jinja").write_text("{{ '\\ud800' }}" + (BASE / "chat_template.jinja").read_text(encoding="utf-8"), encoding="utf-8")
    with pytest.raises(InputError, match=r"\[(tokenizer-unloadable|chat-\w+)\]"):
        ChatTemplate(load_tokenizer(model), values.chat)
