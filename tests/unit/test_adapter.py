import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, get_peft_model

from qlora.core.errors import InputError
from qlora.model import adapter
from qlora.model.chat_template import ChatTemplate
from qlora.params import Params
from qlora.training.lora import lora_config


@pytest.fixture
def published(tiny_model: Any, template: ChatTemplate, default_params: Params, tmp_path: Path) -> tuple[Any, Path]:
    """An adapter with random weights, and the folder where it was published."""
    torch.manual_seed(0)
    model = get_peft_model(tiny_model, lora_config(default_params.lora, tiny_model))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.normal_(std=0.05)
    adapter.publish(model, template, tmp_path / "adapter", "tiny")
    return model, tmp_path / "adapter"


def test_nothing_pickled_and_no_path_of_a_machine(published: tuple[Any, Path]) -> None:
    _, folder = published
    assert {path.name for path in folder.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "chat_template.jinja",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    for path in folder.iterdir():
        content = path.read_bytes()
        assert str(Path.cwd()).encode() not in content
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] == "models/base/tiny"
    assert config["target_modules"] == sorted(config["target_modules"])


@pytest.mark.parametrize(("umask", "permissions"), [(0o022, 0o644), (0o027, 0o640)])
def test_its_files_are_as_readable_as_any_other_file(published: tuple[Any, Path], template: ChatTemplate, umask: int, permissions: int) -> None:
    model, folder = published
    before = os.umask(umask)
    try:
        adapter.publish(model, template, folder, "tiny")
    finally:
        os.umask(before)
    assert {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()} == {path.name: permissions for path in folder.iterdir()}


def test_it_loads_by_plain_peft_from_the_root_and_gives_the_same_logits(published: tuple[Any, Path]) -> None:
    model, folder = published
    loaded = AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.arange(300, 320)[None]
    with torch.no_grad():
        assert torch.equal(model.eval()(input_ids=ids).logits, loaded.eval()(input_ids=ids).logits)


def test_it_loads_by_our_own_loader(published: tuple[Any, Path], default_params: Params) -> None:
    from qlora.model.loading import load_model

    model, folder = published
    base = load_model(default_params.base_model, Path("models/base/tiny"), torch.device("cpu"), progress=False)
    ids = torch.arange(300, 320)[None]
    with torch.no_grad():
        assert torch.equal(model.eval()(input_ids=ids).logits, adapter.load_adapter(base, folder, "tiny").eval()(input_ids=ids).logits)


def test_publishing_replaces_the_whole_folder(published: tuple[Any, Path], template: ChatTemplate) -> None:
    model, folder = published
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    (folder / "training_args.bin").write_bytes(b"a pickle")
    adapter.publish(model, template, folder, "tiny")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_folder_without_an_adapter_says_how_to_get_one(tiny_model: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="dvc repro train"):
        adapter.load_adapter(tiny_model, tmp_path, "tiny")


def test_an_adapter_of_another_base_model_is_refused(published: tuple[Any, Path], tokenizer: Any) -> None:
    from transformers import AutoModelForCausalLM

    _, folder = published
    config = AutoModelForCausalLM.from_pretrained("models/base/tiny").config
    config.intermediate_size = 64
    with pytest.raises(InputError, match="does not fit this base model"):
        adapter.load_adapter(AutoModelForCausalLM.from_config(config), folder, "tiny")
    with pytest.raises(InputError, match=r"adapter-foreign\] .* was trained on models/base/tiny, base_model.name is 'large'"):
        adapter.load_adapter(AutoModelForCausalLM.from_pretrained("models/base/tiny"), folder, "large")


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("kept", [0.0, 0.5])
def test_a_damaged_adapter_is_refused(published: tuple[Any, Path], name: str, kept: float) -> None:
    from transformers import AutoModelForCausalLM

    _, folder = published
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(InputError, match="adapter-unloadable"):
        adapter.load_adapter(AutoModelForCausalLM.from_pretrained("models/base/tiny"), folder, "tiny")


def test_a_tokenizer_that_saves_other_than_it_is_publishes_nothing(
    published: tuple[Any, Path], template: ChatTemplate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = published
    save = template.tokenizer.save_pretrained

    def save_badly(folder: Path) -> None:
        save(folder)
        path = Path(folder) / "chat_template.jinja"
        path.write_text(path.read_text(encoding="utf-8").replace("\\n\\n", "\\n"), encoding="utf-8")

    adapter.require_saveable(template)
    monkeypatch.setattr(template.tokenizer, "save_pretrained", save_badly)
    with pytest.raises(InputError, match="chat-reloaded"):
        adapter.require_saveable(template)
    with pytest.raises(InputError, match="chat-reloaded"):
        adapter.publish(model, template, tmp_path / "other", "tiny")
    assert not list(tmp_path.glob("other*"))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("target_modules", r"(([a-z_0-9]+)+\.?)+!"),
        ("exclude_modules", r"(([a-z_0-9]+)+\.?)+!"),
        ("layers_pattern", ["(.*)*!"]),
        ("rank_pattern", {"(([a-z_]+)+)+!": 8}),
        ("alpha_pattern", {"(": 8}),
    ],
)
def test_a_config_with_a_pattern_is_refused_before_it_is_searched_for(published: tuple[Any, Path], tiny_model: Any, key: str, value: Any) -> None:
    """A search by one of these does not end."""
    _, folder = published
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), key: value}), encoding="utf-8")
    with pytest.raises(InputError, match=rf"adapter-unloadable\] .*{key} of adapter_config.json holds something else than names"):
        adapter.load_adapter(tiny_model, folder, "tiny")
