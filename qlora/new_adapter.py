"""The adapter as a training begins with it: new, or with the weights of an earlier one."""

import json
from pathlib import Path

from peft import LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import PreTrainedModel

from qlora.adapter import CONFIG, WEIGHTS
from qlora.errors import InputError
from qlora.manifest import project_root, sha256_of
from qlora.params.lora import LoraParams


def lora_config(params: LoraParams, base: PreTrainedModel) -> LoraConfig:
    # Embeddings and output head that are one matrix are learned as one, or merging would tear them apart.
    tied = bool(base.config.get_text_config().tie_word_embeddings) and not {"embed_tokens", "lm_head"}.isdisjoint(params.modules_to_save or ())
    return LoraConfig(
        ensure_weight_tying=tied,
        task_type="CAUSAL_LM",
        r=params.r,
        lora_alpha=params.lora_alpha,
        lora_dropout=params.lora_dropout,
        target_modules=params.target_modules,
        use_rslora=params.use_rslora,
        use_dora=params.use_dora,
        # A copy: PEFT changes it.
        modules_to_save=list(params.modules_to_save) if params.modules_to_save else None,
        bias="none",
    )


def begin_from(model: PeftModel, params: LoraParams) -> None:
    """Put the weights of `lora.init_adapter` into a new adapter; without one it stays as it was made.

    Raises:
        InputError: there is no such adapter, its weights are not those of the hash, or it is of another kind or shape.
    """
    if params.init_adapter is None:
        return
    places = [Path(params.init_adapter), project_root() / params.init_adapter]
    folder = next((place for place in places if (place / WEIGHTS).is_file()), None)
    if folder is None:
        raise InputError("init-adapter", f"lora.init_adapter = {params.init_adapter!r} is no folder with {WEIGHTS} and {CONFIG}")
    if (found := sha256_of(folder / WEIGHTS)) != params.init_adapter_sha256:
        raise InputError("init-adapter", f"{folder / WEIGHTS} has the sha256 {found}, lora.init_adapter_sha256 is {params.init_adapter_sha256}")
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        differences = [
            f"{name} is {config.get(name)!r} there and {getattr(params, name)!r} here"
            for name in ("r", "lora_alpha", "use_rslora", "use_dora")
            if (config.get(name) or 0) != getattr(params, name)
        ]
        if differences:
            raise InputError("init-adapter", f"{folder} is another kind of adapter: lora.{', lora.'.join(differences)}")
        weights = load_file(folder / WEIGHTS)
        result = set_peft_model_state_dict(model, weights)
        own = get_peft_model_state_dict(model, save_embedding_layers=False)
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise InputError("init-adapter", f"{folder} can't be put on this base model: {error}") from None
    if result.unexpected_keys or own.keys() != weights.keys():
        names = sorted(own.keys() ^ weights.keys()) or result.unexpected_keys
        raise InputError(
            "init-adapter", f"{folder} adapts other layers: {len(names)} weights are on one side alone, such as {names[0]}; see lora.target_modules"
        )
