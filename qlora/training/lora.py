"""The base model with the adapter as a training starts with it: new, or with the weights of an earlier one."""

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from transformers import PreTrainedModel, set_seed

from qlora.core.errors import InputError, translate_errors
from qlora.core.hashing import project_root, sha256_of
from qlora.model.adapter import CONFIG, WEIGHTS, remember_start
from qlora.model.distributed import one_process_at_a_time
from qlora.model.loading import load_model
from qlora.params import Params
from qlora.params.lora import LoraParams
from qlora.training.fsdp import shard_layers


def lora_config(params: LoraParams, base: PreTrainedModel) -> LoraConfig:
    # Embeddings and output head that are one matrix are trained as one, or merging would tear them apart.
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
        init_lora_weights=params.init_lora_weights,
        # A copy: PEFT changes it.
        modules_to_save=list(params.modules_to_save) if params.modules_to_save else None,
        bias="none",
    )


def with_adapter(base: PreTrainedModel, params: LoraParams) -> PeftModel:
    """The base model with a new adapter.

    Raises:
        InputError: it has no such layers, or PEFT can't adapt them.
    """
    problem = f"asks for an adapter that {base.config.model_type} models can't have"
    with translate_errors("lora-layers", "params.yaml", problem, "change lora.target_modules or lora.modules_to_save"):
        model: PeftModel = get_peft_model(base, lora_config(params, base))
    return model


def adapter_model(values: Params, folder: Path, device: torch.device) -> PeftModel:
    """The base model with a new adapter on the device, or this process's part of one that several processes shard."""
    is_sharded = values.hardware.strategy == "fsdp2"
    with one_process_at_a_time() if is_sharded else nullcontext():
        place = torch.device("cpu") if is_sharded else device
        base = load_model(values.base_model, folder, place, progress=values.runtime.progress, quantise_on=device if is_sharded else None)
        # Before the adapter is made: its first weights are random.
        set_seed(values.train.seed)
        model = with_adapter(base, values.lora)
        if values.lora.init_lora_weights is not True:
            require_own_matrices(model, values.lora)
            remember_start(model)
        load_init_adapter(model, values.lora)
        leave_inputs_to_autocast(model, values)
        if is_sharded:
            shard_layers(model, device, offload=values.hardware.offload_params)
    return model


def leave_inputs_to_autocast(model: PeftModel, params: Params) -> None:
    """Keep the inputs of adapters in bfloat16, where that computes the same.

    PEFT casts each to the adapter's float32, and autocast casts it back at once, after a copy of each layer's input of twice the size. Without
    dropout between the two casts the bits are the same. On a GPU dropout draws another mask for another type, which is as good; what it keeps it
    scales in float32 either way. On a CPU it rounds its factor to the type of its input, so there the copies stay.
    """
    if params.base_model.dtype == "bfloat16" and (params.hardware.device == "cuda" or params.lora.lora_dropout == 0):
        for module in model.modules():
            if isinstance(module, LoraLayer):
                module.cast_input_dtype_enabled = False


def require_own_matrices(model: PeftModel, params: LoraParams) -> None:
    """Refuse first weights that are not parts of the adapted weights alone.

    Raises:
        InputError: an adapted layer is not linear, is one matrix with the embeddings, which would change too, or has a rank below lora.r.
    """
    embeddings = model.get_input_embeddings().weight
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        layer: Any = module.get_base_layer()
        if not isinstance(layer, torch.nn.Linear) or layer.weight is embeddings:
            raise InputError(
                "init-lora-weights",
                f"lora.init_lora_weights = {params.init_lora_weights!r} takes parts out of linear layers, {name} is an embedding or shares its "
                "matrix: leave it out of lora.target_modules, or set init_lora_weights to true",
            )
        if params.r > (rank := min(layer.weight.shape)):
            raise InputError(
                "init-lora-weights",
                f"lora.r = {params.r} is above the rank of {name}, {rank}, so lora.init_lora_weights = {params.init_lora_weights!r} has too few "
                "components: lower lora.r, or set init_lora_weights to true",
            )


def load_init_adapter(model: PeftModel, params: LoraParams) -> None:
    """Put the weights of `lora.init_adapter` into a new adapter; without one it stays as it was made.

    Raises:
        InputError: there is no such adapter, its weights are not those of the hash, or it is of another kind or shape.
    """
    if params.init_adapter is None:
        return
    places = [Path(params.init_adapter), project_root() / params.init_adapter]
    folder = next((place for place in places if (place / WEIGHTS).is_file()), None)
    if folder is None:
        raise InputError("init-adapter", f"lora.init_adapter = {params.init_adapter!r} is not a folder with {WEIGHTS} and {CONFIG}")
    if (found := sha256_of(folder / WEIGHTS)) != params.init_adapter_sha256:
        raise InputError("init-adapter", f"{folder / WEIGHTS} has the sha256 {found}, lora.init_adapter_sha256 is {params.init_adapter_sha256}")
    with translate_errors("init-adapter", folder, "can't be put on this base model", "choose another lora.init_adapter"):
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
    if result.unexpected_keys or own.keys() != weights.keys():
        names = sorted(own.keys() ^ weights.keys()) or result.unexpected_keys
        raise InputError(
            "init-adapter", f"{folder} adapts other layers: {len(names)} weights are on one side alone, such as {names[0]}; see lora.target_modules"
        )
