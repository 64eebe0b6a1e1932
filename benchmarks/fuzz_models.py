"""Damaged and hostile files of models and of DVC through what reads them: one message or a result, nothing else.

    python -m benchmarks.fuzz_models [--cases 20000] [--seed 0] [--only KIND]     writes results/fuzz_models.json

Each case is a good file with some bytes changed, as in benchmarks/fuzz.py, or, where it is JSON, with some values exchanged for others; of
safetensors it is the header. It must be read, or refused by one of this project's errors, within the limit of time; what lies beside it
must stay as it was. Whatever else it ends in ends this program, and the file is kept.
"""

import argparse
import copy
import json
import os
import random
import shutil
import struct
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers.utils import logging as transformers_logging

from benchmarks.fuzz import mutated
from benchmarks.machine import describe_machine
from qlora import params
from qlora.core import dvc_lock
from qlora.core.errors import UserFacingError, machine_error
from qlora.delivery.card.sources import read_by_hand
from qlora.model import rendering
from qlora.model.adapter import load_adapter
from qlora.model.chat_template import ChatTemplate
from qlora.model.config import load_config, load_tokenizer
from qlora.model.loading import load_model, stop_token_ids
from qlora.model.manifest import check_vocabulary, read_manifest, verify
from qlora.training.memory import estimate
from tools import pin, recipes

RESULTS = Path(__file__).parent / "results" / "fuzz_models.json"
ROOT = Path(__file__).parents[1]
BASE = ROOT / "models" / "base" / "tiny"
MOST_SECONDS = 40.0
HOSTILE: tuple[Any, ...] = (
    *(None, True, -1, 0, 1, 3, 2**31, 10**30, 0.5, float("inf"), float("nan"), "", "x", "../../x", "/etc/passwd", "a\nb", "\udc80", "x" * 10_000),
    *([], {}, [None], [[]], {"": ""}, json.loads("[" * 300 + "]" * 300), "([", "LlamaForCausalLM", "float16", "Qwen2Tokenizer", "yarn"),
)
FRAGMENTS = [
    "{{ (9**(9**9)) % 7 }}",
    *("{{ 1/0 }}", "{{ 10**5000 }}", "{% include 'x' %}", "{% import 'x' as y %}", "{% extends 'x' %}", "{{ messages.__class__ }}", "{{ x.y.z }}"),
    *("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "{{ raise_exception('no') }}", "{{ 'x' * 10**6 }}", "{{ messages[99] }}", "{% break %}"),
    *("{% set messages = [] %}", "{% generation %}x{% endgeneration %}", "{% for i in range(10**6) %}{% endfor %}", "{{ messages|tojson }}"),
    *(
        "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}",
        "{{ strftime_now('%Y') }}",
        "{{ cycler() }}",
        "{{ lipsum() }}",
    ),
    *(
        "{{ bos_token }}",
        "{{ 1 if messages }}",
        "{{ '%d' % 'x' }}",
        "{{ {}[[]] }}",
        "{{ messages|sort }}",
        "{{ 'a'.encode('x') }}",
        "{{ ''.join(1) }}",
    ),
    *(
        "{{ messages|map('upper')|list }}",
        "{{ undefined() }}",
        "{{ 'x'|int(base=99) }}",
        "{#",
        "{{",
        "%}",
        "{% if %}",
        "{% endfor %}",
        "\ue000" + "0\ue001",
    ),
]


class Kind(NamedTuple):
    """A file that others wrote, and what reads it."""

    good: Path
    """The file that is changed; it is copied with its folder, if it is a model's or an adapter's."""
    read: Callable[[Path], object]
    """Takes the changed file."""
    change: Callable[[bytes, random.Random], bytes]


def changed_json(content: bytes, rng: random.Random) -> bytes:
    """With one to four values, at any depth, exchanged, removed or under another name; or, in a third of all cases, with other bytes."""
    if rng.random() < 1 / 3:
        return mutated(content, ".json", rng)
    record = json.loads(content)
    for _ in range(rng.randint(1, 4)):
        places = list(_places(record))
        if not places:
            break
        inside, key = rng.choice(places)
        kind = rng.randrange(5)
        if kind == 0:
            del inside[key]
        elif kind == 1 and isinstance(inside, dict):
            inside[rng.choice(("x", "", "../x", key + "\n"))] = inside.pop(key)
        else:
            inside[key] = copy.deepcopy(rng.choice(HOSTILE))
    return json.dumps(record).encode()


def _places(value: Any, most: int = 200) -> list[tuple[Any, Any]]:
    """(container, key) of values, of long lists the first ones."""
    inside = list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
    found = [(value, key) for key, _ in inside[:most]]
    for _, inner in inside[:most]:
        found += _places(inner, 20) if len(found) < most else []
    return found


def changed_weights(content: bytes, rng: random.Random) -> bytes:
    """A safetensors file with another header, another length of it, or other bytes."""
    (size,) = struct.unpack("<Q", content[:8])
    header, body = content[8 : 8 + size], content[8 + size :]
    kind = rng.randrange(4)
    if kind == 0:
        return struct.pack("<Q", rng.choice((0, 1, size - 1, size + 1, 2**31, 2**63, 2**64 - 1))) + content[8:]
    if kind == 1:
        return content[: rng.randrange(len(content))]
    header = changed_json(header, rng)
    return struct.pack("<Q", len(header)) + header + (body if kind == 2 else body[: rng.randrange(len(body))])


def changed_template(content: bytes, rng: random.Random) -> bytes:
    text = content.decode()
    for _ in range(rng.randint(1, 3)):
        place = rng.randrange(len(text) + 1)
        end = min(len(text), place + rng.choice((0, 0, 1, 20)))
        text = text[:place] + rng.choice(FRAGMENTS) + text[end:]
    return mutated(text.encode(), ".yaml", rng) if rng.random() < 0.2 else text.encode()


def changed_yaml(content: bytes, rng: random.Random) -> bytes:
    return mutated(content, ".yaml", rng)


def kinds(values: params.Params, folder: Path) -> dict[str, Kind]:
    """By name."""
    device = torch.device("cpu")
    base = load_model(values.base_model, BASE, device, progress=False)
    good_tokenizer = load_tokenizer(BASE)
    adapter = _adapter(values, folder / "adapter")
    (folder / "config").write_text("[core]\n    analytics = false\n[cache]\n    dir = cache\n", encoding="utf-8")

    def tokenizer(path: Path) -> None:
        check_vocabulary(path.parent)
        ChatTemplate(load_tokenizer(path.parent), values.chat)

    def config(path: Path) -> None:
        check_vocabulary(path.parent)
        estimate(values, load_config(path.parent))
        load_model(values.base_model, path.parent, device, progress=False)

    def generation_config(path: Path) -> None:
        stop_token_ids(load_model(values.base_model, path.parent, device, progress=False), good_tokenizer, [])

    def weights(path: Path) -> None:
        pin.require_loadable(path.parent)
        load_model(values.base_model, path.parent, device, progress=False)

    def recipe(path: Path) -> None:
        recipes.summary(path)
        recipes.compose(ROOT / "params.yaml", path)

    def dvc_config(path: Path) -> None:
        (path.parent / ".dvc").mkdir(exist_ok=True)
        shutil.copy(path, path.parent / ".dvc" / "config")
        os.environ["DVC_ROOT"] = str(path.parent)
        try:
            dvc_lock.cache_folder()
        finally:
            del os.environ["DVC_ROOT"]

    return {
        "tokenizer": Kind(BASE / "tokenizer.json", tokenizer, changed_json),
        "tokenizer config": Kind(BASE / "tokenizer_config.json", tokenizer, changed_json),
        "template": Kind(BASE / "chat_template.jinja", tokenizer, changed_template),
        "config": Kind(BASE / "config.json", config, changed_json),
        "generation config": Kind(BASE / "generation_config.json", generation_config, changed_json),
        "safetensors": Kind(BASE / "model.safetensors", weights, changed_weights),
        "adapter config": Kind(adapter / "adapter_config.json", lambda path: load_adapter(copy.deepcopy(base), path.parent, "tiny"), changed_json),
        "adapter": Kind(adapter / "adapter_model.safetensors", lambda path: load_adapter(copy.deepcopy(base), path.parent, "tiny"), changed_weights),
        "manifest": Kind(ROOT / "models/base/tiny.json", lambda path: verify(read_manifest(path), BASE, None), changed_json),
        "lock": Kind(ROOT / "dvc.lock", lambda path: (dvc_lock.recorded(path), dvc_lock.locked_stages(path)), changed_yaml),
        "pipeline": Kind(
            ROOT / "dvc.yaml", lambda path: [dvc_lock.dependencies_of(name, path) for name in dvc_lock.pipeline_stages(path)], changed_yaml
        ),
        "recipe": Kind(ROOT / "recipes/tiny-cpu.yaml", recipe, changed_yaml),
        "card texts": Kind(ROOT / "models/card.yaml", read_by_hand, changed_yaml),
        "dvc config": Kind(folder / "config", dvc_config, lambda content, rng: mutated(content, ".yaml", rng)),
    }


def _adapter(values: params.Params, folder: Path) -> Path:
    """A new adapter as PEFT saves it."""
    from qlora.training.lora import adapter_model

    model = adapter_model(values, BASE, torch.device("cpu"))
    model.save_pretrained(folder)
    record = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    record |= {"base_model_name_or_path": "models/base/tiny", "target_modules": sorted(record["target_modules"])}
    (folder / "adapter_config.json").write_text(json.dumps(record), encoding="utf-8")
    return folder


def fuzz(cases: int, seed: int, only: str | None = None) -> dict[str, Any]:
    """So many cases of all kinds together."""
    values = params.load(ROOT / "params.yaml")
    transformers_logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    # Some of the templates never end.
    rendering.MOST_SECONDS = 1
    rng = random.Random(seed)
    outcomes: Counter[str] = Counter()
    slowest = 0.0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        all_kinds = {name: kind for name, kind in kinds(values, folder).items() if only in (None, name)}
        for number in range(cases):
            name, kind = list(all_kinds.items())[number % len(all_kinds)]
            place = folder / "case"
            if kind.good.parent in (BASE, folder / "adapter"):
                shutil.copytree(kind.good.parent, place)
            else:
                place.mkdir()
            path = place / kind.good.name
            content = kind.change(kind.good.read_bytes(), rng)
            path.write_bytes(content)
            beside = _bytes_of(place)
            began = time.monotonic()
            try:
                kind.read(path)
                outcome = "ok"
            except UserFacingError as error:
                outcome = error.code
            except BaseException as error:
                # As command.run does.
                if unable := machine_error(error, path):
                    outcomes[f"{name}: {unable.code}"] += 1
                    shutil.rmtree(place)
                    continue
                kept = Path(tempfile.gettempdir()) / f"fuzz-{seed}-{number}-{path.name}"
                kept.write_bytes(content)
                print(f"case {number}, {name}, kept as {kept}:", file=sys.stderr, flush=True)
                raise
            outcomes[f"{name}: {outcome}"] += 1
            slowest = max(slowest, time.monotonic() - began)
            assert slowest < MOST_SECONDS, f"case {number} took {slowest:.1f} s"
            shutil.rmtree(place / ".dvc", ignore_errors=True)
            assert _bytes_of(place) == beside, f"case {number} changed a file"
            shutil.rmtree(place)
    return {"cases": cases, "slowest_seconds": round(slowest, 2), "outcomes": dict(sorted(outcomes.items()))}


def _bytes_of(folder: Path) -> dict[str, int]:
    return {path.name: hash(path.read_bytes()) for path in folder.iterdir()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="one kind of file; nothing is written")
    arguments = parser.parse_args()
    record = {"machine": describe_machine(), "seed": arguments.seed, **fuzz(arguments.cases, arguments.seed, arguments.only)}
    if not arguments.only:
        RESULTS.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
