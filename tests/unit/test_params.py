import re
import shutil
from pathlib import Path
from typing import get_args

import pytest
from ruamel.yaml import YAML

from qlora import params
from qlora.core.errors import InputError
from qlora.params.evaluate import MOST_METRICS, Headline
from qlora.params.section import OTHER_NAMES
from qlora.scoring.measures import MEASURES
from tests.helpers import chat_params


def edited(tmp_path: Path, *changes: tuple[str, str, object]) -> Path:
    """params.yaml with sections' keys set; a value of `...` deletes the key."""
    path = tmp_path / "params.yaml"
    shutil.copy("params.yaml", path)
    yaml = YAML()
    document = yaml.load(path)
    for section, key, value in changes:
        if value is ...:
            del document[section][key]
        else:
            document.setdefault(section, {})[key] = value
    yaml.dump(document, path)
    return path


def message(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        params.load(path)
    assert caught.value.exit_code == 2
    return str(caught.value)


@pytest.mark.parametrize("spelling", ["2e-5", "2e-05", "0.00002", "2E-5", "2.0e-5"])
def test_one_number_in_every_spelling(tmp_path: Path, spelling: str) -> None:
    text = re.sub(r"(?<=learning_rate: )\S+", spelling, Path("params.yaml").read_text(encoding="utf-8"))
    path = tmp_path / "params.yaml"
    path.write_text(text, encoding="utf-8")
    assert params.load(path).train.learning_rate == 0.00002


def test_all_mistakes_are_reported_at_once_each_with_its_place_value_and_range(tmp_path: Path) -> None:
    path = edited(
        tmp_path,
        ("data", "on_invalid", "dorp"),
        ("train", "learning_rat", 1e-4),
        ("train", "learning_rate", -1),
        ("lora", "r", "16"),
        ("predict", "top_p", 1.5),
        ("sequence", "max_length", ...),
        ("hardwear", "device", "cpu"),
    )
    text = message(path)
    assert "7 mistake(s)" in text
    assert "data.on_invalid = 'dorp' is not allowed: must be one of 'drop', 'error'; did you mean 'drop'?" in text
    assert "train.learning_rat is not a parameter; did you mean 'train.learning_rate'?" in text
    assert "train.learning_rate = -1 is not allowed: must be greater than 0" in text
    assert "lora.r = '16' is not allowed: must be a valid integer" in text
    assert "predict.top_p = 1.5 is not allowed: must be less than or equal to 1" in text
    assert "sequence.max_length is missing" in text
    assert "hardwear is not a parameter; did you mean 'hardware'?" in text


def test_a_list_or_a_word_where_either_is_allowed(tmp_path: Path) -> None:
    assert params.load(edited(tmp_path, ("lora", "target_modules", ["q_proj"]))).lora.target_modules == ["q_proj"]
    text = message(edited(tmp_path, ("lora", "target_modules", "all-liner")))
    assert text.count("lora.target_modules") == 1
    assert "did you mean 'all-linear'?" in text
    assert "lora.init_lora_weights = 'eva' is not allowed: must be one of 'true', 'pissa', 'olora'" in message(
        edited(tmp_path, ("lora", "init_lora_weights", "eva"))
    )


STARTED = (("lora", "init_adapter", "models/start"), ("lora", "init_adapter_sha256", "0" * 64))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ([("train", "lr_scheduler_type", "constant"), ("train", "warmup_steps", 5)], "warmup_steps = 5 has no effect"),
        ([("train", "eval_strategy", "no"), ("train", "keep", "best")], "keep = 'best' needs a validation loss"),
        ([("train", "eval_strategy", "no"), ("train", "early_stopping_patience", 3)], "early_stopping_patience = 3 needs a validation loss"),
        ([("lora", "init_adapter", "models/start")], "init_adapter and init_adapter_sha256 go together"),
        ([("base_model", "load_in_4bit", True), ("base_model", "load_in_8bit", True)], "load_in_4bit and load_in_8bit are both true"),
        ([*STARTED, ("lora", "init_lora_weights", "pissa")], "init_lora_weights = 'pissa' has no effect with init_adapter"),
        ([("train", "eval_strategy", "steps")], "eval_steps = None does not go with eval_strategy = 'steps'"),
        ([("train", "batch_size", 3), ("hardware", "per_device_train_batch_size", 2)], "train.batch_size = 3 is not a multiple"),
        ([("data", "validation_fraction", 0)], "train.eval_strategy = 'epoch' needs validation rows"),
        (
            [("data", "test_file", "data/raw/tiny/./train-00000-of-00001.parquet"), ("data", "test_fraction", 0.98)],
            "leave no row to train on",
        ),
    ],
)
def test_impossible_pairs_are_refused(tmp_path: Path, changes: list[tuple[str, str, object]], expected: str) -> None:
    assert expected in message(edited(tmp_path, *changes))


@pytest.mark.parametrize("text", ["", "- a\n", "data: [\n", "train: 3\n", "data:\n  test_file: 2024-13-45\n"])
def test_a_file_that_holds_no_sections_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(text, encoding="utf-8")
    assert str(path) in message(path)


def test_a_missing_file_says_where_to_run(tmp_path: Path) -> None:
    shown = message(tmp_path / "params.yaml")
    assert "[params-missing]" in shown
    assert "run from the repository's root" in shown


def test_keys_that_are_no_text_are_unknown_keys(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(Path("params.yaml").read_text(encoding="utf-8").replace("lora:\n", "lora:\n  1: 2\n") + "3: {}\n", encoding="utf-8")
    text = message(path)
    assert "lora.1 is not a parameter" in text
    assert "  3 is not a parameter" in text


def test_no_target_module_is_no_adapter(tmp_path: Path) -> None:
    assert "lora.target_modules = []" in message(edited(tmp_path, ("lora", "target_modules", [])))


def test_values_can_not_be_changed_after_they_were_checked() -> None:
    values = params.load(Path("params.yaml"))
    with pytest.raises(ValueError, match="frozen"):
        values.train.seed = 1
    assert values.gradient_accumulation_steps == values.train.batch_size // values.hardware.per_device_train_batch_size


@pytest.mark.parametrize(
    "text", ["data: " + "[" * 99_990, "data: " + "[" * 49_990 + "]" * 49_990, "data: " + "{a: " * 20_000], ids=["open", "closed", "keys"]
)
def test_deeply_nested_brackets_are_refused(tmp_path: Path, text: str) -> None:
    """A scanner in C recurses without end there."""
    path = tmp_path / "params.yaml"
    path.write_text(text, encoding="utf-8")
    assert "[params-syntax]" in message(path)


FSDP2 = (
    ("hardware", "strategy", "fsdp2"),
    ("hardware", "device", "cuda"),
    ("hardware", "num_processes", 2),
    ("hardware", "per_device_train_batch_size", 1),
)
QLORA = (("base_model", "load_in_4bit", True), ("base_model", "dtype", "bfloat16"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ([*FSDP2, ("hardware", "device", "cpu")], "strategy = 'fsdp2' needs GPUs, but device = 'cpu': choose 'ddp'"),
        ([*FSDP2, ("hardware", "num_processes", 1)], "strategy = 'fsdp2' shards layers over processes, but num_processes = 1"),
        (
            [*FSDP2, *QLORA],
            "base_model.bnb_4bit_quant_storage = 'uint8': fsdp2 is only tried with 4-bit weights kept as a floating type",
        ),
        ([*FSDP2, ("base_model", "load_in_8bit", True)], "base_model.load_in_8bit = true: bitsandbytes computes with a copy of its own"),
        ([*FSDP2, ("lora", "modules_to_save", ["lm_head"])], "lora.modules_to_save trains whole layers, which fsdp2 shards"),
        ([("base_model", "attn_implementation", "flex_attention")], "attn_implementation = 'flex_attention' needs a GPU"),
        ([("hardware", "offload_params", True)], "offload_params = true has no effect with strategy = 'ddp'"),
        (
            [("lora", "init_lora_weights", "pissa"), ("base_model", "dtype", "bfloat16")],
            "lora.init_lora_weights = 'pissa' trains beside what is left of each base weight, which base_model.dtype = 'bfloat16' rounds",
        ),
        ([("lora", "init_lora_weights", "olora"), ("base_model", "load_in_4bit", True)], "which base_model.load_in_4bit = true rounds"),
        ([("lora", "init_lora_weights", "olora"), ("base_model", "load_in_8bit", True)], "which base_model.load_in_8bit = true rounds"),
        ([("hardware", "num_machines", 2)], "num_processes = 1 is not a multiple of num_machines = 2"),
        ([("train", "batch_size", 8), ("hardware", "num_processes", 3)], "train.batch_size = 8 is not a multiple of"),
        (
            [("sequence", "max_length", 2048)],
            "hardware.per_device_train_batch_size = 2 with packing under sdpa compares 4,096 x 4,096 tokens in each layer",
        ),
    ],
)
def test_set_ups_that_cannot_work_are_one_clear_mistake(tmp_path: Path, changes: list[tuple[str, str, object]], said: str) -> None:
    found = message(edited(tmp_path, *changes))
    assert said in found
    assert "has 1 mistake(s)" in found


@pytest.mark.parametrize(
    "changes",
    [
        [*FSDP2, *QLORA, ("base_model", "bnb_4bit_quant_storage", "bfloat16")],
        [*FSDP2, ("hardware", "offload_params", True)],
        [("sequence", "max_length", 2048), ("hardware", "per_device_train_batch_size", 1)],
        [("sequence", "max_length", 2048), ("sequence", "packing", "none")],
        [("sequence", "max_length", 2048), ("hardware", "device", "cuda"), ("base_model", "attn_implementation", "flex_attention")],
        [("hardware", "num_processes", 2), ("hardware", "num_machines", 2), ("train", "batch_size", 4)],
    ],
)
def test_their_counterparts_can(tmp_path: Path, changes: list[tuple[str, str, object]]) -> None:
    params.load(edited(tmp_path, *changes))


def test_the_metrics_of_the_headline_keep_their_order(tmp_path: Path) -> None:
    asked = ["stop_rate", "eval_loss", "bleu", "exact_match", "nll", "chrf", "rouge_1", "perplexity"]
    values = params.load(edited(tmp_path, ("evaluate", "headline", asked)))
    assert values.evaluate.headline == asked
    assert len(asked) == MOST_METRICS


@pytest.mark.parametrize(
    ("headline", "said"),
    [
        (["nll", "bleu", "nll"], "headline = ['nll', 'bleu', 'nll'] lists a metric twice"),
        (["exact_match", "token_f1", "rouge_1", "rouge_2", "rouge_l", "chrf", "bleu", "length_ratio", "nll"], "evaluate.headline = ['exact_match', "),
        ([], "evaluate.headline = [] is not allowed"),
        (["rouge_l", "accuracy"], "evaluate.headline = 'accuracy' is not allowed"),
    ],
    ids=["twice", "more than 8", "none", "unknown"],
)
def test_a_headline_that_can_not_be_shown_is_refused(tmp_path: Path, headline: list[str], said: str) -> None:
    found = message(edited(tmp_path, ("evaluate", "headline", headline)))
    assert said in found
    assert "1 mistake(s)" in found


def test_every_measure_may_stand_in_the_headline() -> None:
    assert set(get_args(Headline)) == {*MEASURES, "eval_loss"}


@pytest.mark.parametrize(("section", "other", "key"), [("predict", "evaluate", "max_new_tokens"), ("evaluate", "predict", "resamples")])
def test_what_is_answered_and_what_is_scored_are_two_sections(tmp_path: Path, section: str, other: str, key: str) -> None:
    """A change of `evaluate` runs no model again."""
    assert hasattr(getattr(params.load(Path("params.yaml")), section), key)
    found = message(edited(tmp_path, (other, key, 2000)))
    # What stood in `evaluate` once is told where it is now.
    assert (f"evaluate.{key} is now predict.{key}" if other == "evaluate" else f"{other}.{key} is not a parameter") in found


@pytest.mark.parametrize("section", ["evaluate", "predict"])
def test_the_old_size_of_a_batch_of_answers_is_told_the_budget(tmp_path: Path, section: str) -> None:
    found = message(edited(tmp_path, (section, "batch_size", 32)))
    assert f"{section}.batch_size is now predict.batch_tokens, rows x (longest prompt + max_new_tokens): set that" in found
    assert "1 mistake(s)" in found


@pytest.mark.parametrize(("key", "value"), [("generation_seeds", []), ("generation_seeds", [1, 1]), ("batch_tokens", 0), ("turns", "first")])
def test_how_answers_are_made_is_checked(tmp_path: Path, key: str, value: object) -> None:
    assert f"{key} = {value!r}" in message(edited(tmp_path, ("predict", key, value)))


def test_loraplus_raises_a_rate_and_lowers_none(tmp_path: Path) -> None:
    assert "train.loraplus_lr_ratio = 0.5 is not allowed: must be greater than or equal to 1" in message(
        edited(tmp_path, ("train", "loraplus_lr_ratio", 0.5))
    )


@pytest.mark.parametrize("name", ["messages", "tools", "bos_token", "not", "True", "none", "a b", "add_generation_prompt"])
def test_a_variable_of_a_template_is_its_own(name: str) -> None:
    with pytest.raises(ValueError, match="a mapping of the chat template's own variables"):
        chat_params(template_kwargs={name: 1})


@pytest.mark.parametrize(
    ("section", "name", "ours"),
    [
        ("train", "lr", "train.learning_rate"),
        ("train", "epochs", "train.num_train_epochs"),
        ("train", "per_device_train_batch_size", "hardware.per_device_train_batch_size"),
        ("train", "gradient_accumulation_steps", "train.batch_size, the rows of an update: the steps follow from it"),
        ("train", "gradient_checkpointing", "hardware.activation_checkpointing"),
        ("sequence", "max_seq_length", "sequence.max_length"),
        ("data", "cutoff_len", "sequence.max_length"),
    ],
)
def test_what_other_tools_call_it_is_known(tmp_path: Path, section: str, name: str, ours: str) -> None:
    assert f"{section}.{name} is not a parameter; here it is {ours}\n" in message(edited(tmp_path, (section, name, 1))) + "\n"


def test_the_names_here_of_what_other_tools_call_otherwise_exist() -> None:
    known = {f"{name}.{key}" for name, field in params.Params.model_fields.items() for key in field.annotation.model_fields}
    named = {found for text in OTHER_NAMES.values() for found in re.findall(r"\b(?:" + "|".join(params.Params.model_fields) + r")\.\w+", text)}
    assert named <= known
    assert all(re.match(r"\w+\.\w+", text) for text in OTHER_NAMES.values())


def test_nothing_is_suggested_where_nothing_is_near(tmp_path: Path) -> None:
    assert "did you mean" not in message(edited(tmp_path, ("train", "zzzzzz", 1)))
