"""The inputs of benchmarks/attack.py: hostile or damaged files, made from a seed and the project's own tiny model."""

import copy
import hashlib
import json
import os
import random
import re
import string
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.attack_server import Script, random_script

MODEL = "models/base/tiny"
ADAPTER = "models/adapter"
MANIFEST = "models/base/tiny.json"
PINNED = (".safetensors", ".json", ".jinja", ".model", ".txt")


@dataclass(frozen=True)
class Link:
    """A symbolic link in a file's place."""

    target: str


@dataclass(frozen=True)
class Fifo:
    """A pipe in a file's place: who opens it waits."""


@dataclass(frozen=True)
class Folder:
    """A folder in a file's place."""


@dataclass(frozen=True)
class Gone:
    """Nothing in a file's place."""


Content = bytes | Link | Fifo | Folder | Gone


@dataclass
class Case:
    """One input: files that lie there when the command begins."""

    name: str
    module: str
    arguments: Sequence[str] = ()
    files: dict[str, Content] = field(default_factory=dict)
    pin: bool = False
    """Whether the manifest of the tiny model is written for the files as they are now: as if they had been pinned like this."""
    lock: Sequence[str] = ()
    """Outputs that dvc.lock records as they are now."""
    stdin: str = ""
    hub: Script | None = None
    slow: bool = False
    """Whether the Hub's client waits between tries as long as it does for a person."""
    environment: Mapping[str, str] = field(default_factory=dict)

    def apply(self, checkout: Path) -> None:
        for name, content in self.files.items():
            path = checkout / name
            path.parent.mkdir(parents=True, exist_ok=True)
            _clear(path)
            if isinstance(content, bytes):
                path.write_bytes(content)
            elif isinstance(content, Link):
                path.symlink_to(content.target)
            elif isinstance(content, Fifo):
                os.mkfifo(path)
            elif isinstance(content, Folder):
                path.mkdir()
        if self.pin:
            _pin(checkout)
        for name in self.lock:
            _lock(checkout, name)


def _clear(path: Path) -> None:
    import shutil

    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif os.path.lexists(path):
        path.unlink()


def _pin(checkout: Path) -> None:
    files = {}
    for path in sorted((checkout / MODEL).iterdir()):
        if path.is_file() and path.suffix in PINNED and path.stat().st_size < 1 << 30 and not str(path.resolve()).startswith("/dev"):
            data = path.read_bytes()
            files[path.name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (checkout / MANIFEST).write_text(json.dumps({"files": files}), encoding="utf-8")


def _lock(checkout: Path, name: str) -> None:
    from qlora.core.dvc_lock import md5_of

    path, lock = checkout / name, checkout / "dvc.lock"
    text = lock.read_text(encoding="utf-8")
    found = re.search(rf"path: {re.escape(name)}\n\s+hash: md5\n\s+md5: (\S+)", text)
    if found and path.exists():
        lock.write_text(text.replace(found[1], md5_of(path, checkout)), encoding="utf-8")


class Seeds:
    """The files that are damaged."""

    def __init__(self, checkout: Path, real: Path | None) -> None:
        self.checkout = checkout
        self.model = {path.name: path.read_bytes() for path in sorted((checkout / MODEL).iterdir()) if path.is_file()}
        self.adapter = {path.name: path.read_bytes() for path in sorted((checkout / ADAPTER).iterdir()) if path.is_file()}
        folders = {path.parent for path in real.rglob("tokenizer.json")} if real else set()
        self.real = [{path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()} for folder in sorted(folders)]

    def read(self, name: str) -> bytes:
        return (self.checkout / name).read_bytes()


Attack = Callable[[Seeds, random.Random, int], Case]

DEEP: Any = []
for _ in range(150):
    DEEP = [DEEP]
TEXTS = (
    "",
    " ",
    "\0",
    "\x1b]0;owned\x07\x1b[2J",
    "\u202egnp.exe",
    "\ud800",
    "../../../etc/passwd",
    "/etc/passwd",
    "/dev/zero",
    "~",
    "a" * 100_000,
    "\r\n",
    "true",
    "null",
    "NaN",
    "1e999",
    "٣",
    "Traceback (most recent call lost)",
    "{0.__class__}",
    "%s%n",
    "${base_model.name}",
    "<s>",
    "🙂" * 50,
    "e\u0301",
    "-1",
    "os.system",
    "[",
    "(a+)+$",
)
NUMBERS = (-1, 0, 1, 2, 3, 7, 255, 1 << 15, 1 << 31, (1 << 32) - 1, 1 << 40, 1 << 63, 1 << 64, 10**30, 0.5, -0.0, 1e308, float("nan"), float("inf"))
OTHERS: tuple[Any, ...] = (None, True, False, [], {}, [None], {"": None}, [[]], DEEP, {"a": {"b": [1, "x"]}}, ["a", 1, None, {}], [0] * 10_000)


def nasty(rng: random.Random) -> Any:
    return copy.deepcopy(rng.choice(rng.choice((TEXTS, NUMBERS, OTHERS))))


def places(tree: Any, depth: int = 0) -> list[tuple[Any, Any]]:
    """(container, key) of every value; of long lists a few."""
    found: list[tuple[Any, Any]] = []
    keys: list[Any] = list(tree) if isinstance(tree, dict) else list(range(len(tree))) if isinstance(tree, list) else []
    if len(keys) > 60:
        keys = keys[:20] + keys[-20:]
    for key in keys:
        found.append((tree, key))
        if depth < 12:
            found += places(tree[key], depth + 1)
    return found


def shaken(tree: Any, rng: random.Random, times: int | None = None) -> Any:
    """The tree with some values changed."""
    tree = copy.deepcopy(tree)
    for _ in range(times or rng.choice((1, 1, 1, 2, 3, 6))):
        found = places(tree)
        if not found:
            return nasty(rng)
        holder, key = rng.choice(found)
        action = rng.randrange(8)
        value = holder[key]
        if action == 0:
            del holder[key]
        elif action == 1 and isinstance(holder, dict):
            holder[rng.choice((*TEXTS[:6], "type", "__class__", "id"))] = holder.pop(key)
        elif action == 2 and isinstance(holder, list):
            holder.append(copy.deepcopy(value))
        elif action == 3:
            holder[key] = [value] if rng.random() < 0.5 else {"value": value}
        elif action == 4 and isinstance(value, str):
            holder[key] = rng.choice((value[::-1], value * 1000, value + "\x1b[31m", value[:-1], value.upper(), f"\u202e{value}"))
        elif action == 5 and isinstance(value, int | float):
            holder[key] = rng.choice((-value, value + 1, value * 10**6, str(value), float(value) + 0.5, -value - 1))
        else:
            holder[key] = nasty(rng)
    return tree


MAGIC = (
    b"\0",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"\x1f\x8b\x08",
    b"\x80\x04\x95",
    b"PK\x03\x04",
    b"\x1b[31m",
    b"\r\n",
    b"{",
    b"}",
    b"[" * 3000,
    b'"',
    b"\xed\xa0\x80",
    b"9" * 5000,
)


def broken(data: bytes, rng: random.Random) -> bytes:
    """The bytes, damaged."""
    if not data:
        return rng.randbytes(20)
    for _ in range(rng.choice((1, 1, 2, 5))):
        place, action = rng.randrange(len(data) + 1), rng.randrange(9)
        if action == 0:
            data = data[:place]
        elif action == 1:
            data = data[:place] + rng.choice(MAGIC) + data[place:]
        elif action == 2:
            data = data[:place] + rng.randbytes(rng.randrange(1, 40)) + data[place + rng.randrange(20) :]
        elif action == 3:
            data = data[:place] + data[place + rng.randrange(1, 300) :]
        elif action == 4:
            data = data + data[place:] if len(data) < 1 << 22 else data[:place]
        elif action == 5:
            data = bytes(len(data)) if rng.random() < 0.2 else data[:place] + bytes(min(50, len(data) - place)) + data[place + 50 :]
        elif action == 6:
            data = data.decode("latin-1").encode("utf-16") if rng.random() < 0.3 else data.replace(b"\n", b"\r")
        else:
            changed = bytearray(data)
            for _ in range(rng.choice((1, 3, 20))):
                if changed:
                    changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
            data = bytes(changed)
    return data


def as_json(tree: Any) -> bytes:
    return json.dumps(tree, indent=None if isinstance(tree, list) else 1).encode()


def special(rng: random.Random) -> Content:
    """What is no file."""
    return rng.choice(
        (
            Link("/dev/zero"),
            Link("nowhere"),
            Fifo(),
            Folder(),
            Gone(),
            Link("/proc/self/environ"),
            Link("/dev/null"),
            Link("../../../beside/canary.txt"),
            b"",
        )
    )


PREDICT = ("--test", "data/prepared/test.jsonl", "--manifests", "models/base", "--notes", "metrics", "--predictions")
BASELINE = (*PREDICT, "data/predictions/base.jsonl")
TUNED = (*PREDICT, "data/predictions/tuned.jsonl", "--adapter-folder", "models/adapter")
TRAIN = (
    *("--train", "data/prepared/train.jsonl", "--validation", "data/prepared/validation.jsonl", "--manifests", "models/base"),
    *("--adapter-folder", "models/adapter", "--report", "reports/train.json", "--metrics", "metrics", "--notes", "metrics"),
)
PREPARE = ("--prepared", "data/prepared", "--report", "reports/prepare.json", "--notes", "metrics")
EVALUATE = (
    *("--test", "data/prepared/test.jsonl", "--predictions", "data/predictions", "--train-report", "reports/train.json", "--metrics", "metrics"),
    *("--report", "reports/evaluation.json", "--page", "reports/report.html", "--notes", "metrics"),
)
MODEL_COMMANDS: tuple[tuple[int, str, tuple[str, ...]], ...] = (
    (8, "tools.pin", ("attacked", "--path", MODEL)),
    (4, "tools.inspect", ("--count", "2")),
    (3, "tools.chat", ("--base", "--prompt", "What is 1 + 1?", "--max-new-tokens", "3")),
    (2, "tools.chat", ("--max-new-tokens", "3")),
    (1, "tools.check", ()),
    (1, "tools.preflight", ()),
    (1, "tools.doctor", ()),
    (2, "stages.predict", BASELINE),
    (1, "stages.train", TRAIN),
    (1, "tools.merge", ("--dtype", "float32", "--num-examples", "2")),
)


def on_model(name: str, rng: random.Random, files: dict[str, Content], commands: Sequence[tuple[int, str, tuple[str, ...]]] = MODEL_COMMANDS) -> Case:
    """A command that reads the base model, whose files were pinned as they are."""
    _, module, arguments = rng.choices(commands, [weight for weight, *_ in commands])[0]
    placed = {f"{MODEL}/{file}": content for file, content in files.items()}
    return Case(name, module, arguments, placed, pin=module != "tools.pin", stdin="What is 1 + 1?\n/exit\n" if "--prompt" not in arguments else "")


# Chat templates.

USUAL = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
BOMBS = (
    "{{ 7**(9**9) }}",
    "{% set x = 3**(10**8) %}",
    "{{ (2**(10**10))|string }}",
    "{{ 'a' * 10**11 }}",
    "{{ ('a' * 10**8)|length }}",
    "{{ 'a'|center(10**10) }}",
    "{{ 'ab'.replace('', 'x' * 10**9) }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '{:>1000000000}'.format(1) }}",
    "{{ '\\t'.expandtabs(10**10) }}",
    "{{ lipsum(n=10**6) }}",
    "{{ range(10**9)|list }}",
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% set ns = namespace(x=()) %}{% for a in range(99999) %}{% set ns.x = (ns.x,) %}{% endfor %}{{ {ns.x: 1} }}",
    "{% set ns = namespace(x=()) %}{% for b in range(9) %}{% for a in range(99999) %}{% set ns.x = (ns.x,) %}{% endfor %}{% endfor %}"
    "{{ {ns.x: 1}|length }}",
    "{% set ns = namespace(x=[]) %}{% for a in range(99999) %}{% set ns.x = [ns.x] %}{% endfor %}{{ ns.x }}",
    "{% set ns = namespace(x=[]) %}{% for a in range(99999) %}{% set ns.x = [ns.x] %}{% endfor %}{{ ns.x|tojson }}",
    "{% set ns = namespace(x=[]) %}{% for a in range(99999) %}{% set ns.x = [ns.x] %}{% endfor %}{{ ns.x == [ns.x] }}",
    "{% set ns = namespace(x=[]) %}{% for a in range(99999) %}{% set ns.x = ns.x|map('upper') %}{% endfor %}{{ ns.x|list }}",
    "{% set ns = namespace(x=[]) %}{% for a in range(99999) %}{% set ns.x = ns.x|reverse %}{% endfor %}{{ ns.x|list }}",
    "{% set ns = namespace(x='a') %}{% for a in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
    "{% set ns = namespace(x=[1]) %}{% for a in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x }}",
    "{% set ns = namespace(x=[1]) %}{% for a in range(40) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
    "{% set ns = namespace(x=[1]) %}{% for a in range(40) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x|tojson }}",
    "{{ ('a' * 100000)|urlize }}",
    "{{ ('www.' * 20000)|urlize }}",
    "{{ ('<' * 100000)|striptags }}",
    "{{ ('<!--' * 50000)|striptags }}",
    "{{ ('a ' * 500000)|wordwrap(1) }}",
    "{{ ('a b ' * 500000)|title }}",
    "{{ ('aB' * 90000).encode('idna') }}",
    "{{ ('é' * 90000).encode('punycode') }}",
    "{{ '9' * 100000|int }}",
    "{{ ('9' * 100000)|int }}",
    "{{ 10**5000 }}",
    "{{ 1/0 }}",
    "{{ raise_exception('\x1b]0;owned\x07') }}",
    "{{ raise_exception('\u202e' * 1000) }}",
    "{{ raise_exception(messages) }}",
    "{{ raise_exception() }}",
    "{{ raise_exception(7 ** 100000) }}",
    "{{ strftime_now('%' * 1000) }}",
    "{{ strftime_now('\ud800') }}",
    "{{ strftime_now(1) }}",
    "{% macro strftime_now(f) %}x{% endmacro %}{{ strftime_now('%d') }}",
    "{{ messages.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages|attr('__class__') }}",
    "{{ cycler.__init__.__globals__.os.popen('touch /tmp/owned') }}",
    "{{ self._TemplateReference__context }}",
    "{{ self.__init__.__globals__ }}",
    "{{ messages.append(messages) }}",
    "{% set _ = messages.append(1) %}",
    "{{ messages[0].update({'content': 'x'}) }}",
    "{{ messages|map(attribute='content')|sum }}",
    "{{ messages|random }}",
    "{{ range(10**5)|random }}",
    "{{ messages|groupby('role')|list }}",
    "{{ messages|sort }}",
    "{{ messages|tojson(indent=10**9) }}",
    "{{ messages|pprint }}",
    "{{ messages|batch(10**9, 'x')|list }}",
    "{{ messages|slice(10**9)|list }}",
    "{{ none.x }}",
    "{{ undefined_thing.x }}",
    "{{ undefined_thing() }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
    "{% extends 'x' %}",
    "{% block content %}{% endblock %}{{ self.content() }}",
    "{% block a %}{{ self.a() }}{% endblock %}",
    "{% generation %}{% generation %}x{% endgeneration %}{% endgeneration %}",
    "{% generation %}",
    "{% endgeneration %}",
    "{% break %}",
    "{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}",
    "{% for m in messages %}{{ loop.cycle() }}{% endfor %}",
    "{% call x() %}{% endcall %}",
    "{% filter upper %}{% endfilter %}",
    "{% autoescape true %}{{ messages }}{% endautoescape %}",
    "{% raw %}{{ x }}{% endraw %}",
    "{% raw %}",
    "{# ",
    "{{",
    "{%",
    "}}",
    "{{ '\\ud800' }}",
    "{{ '\ud800' }}",
    "\0",
    "\x1b[2J{{ messages }}",
    "{{ \ue0000\ue001 }}",
    "\ue000\x30\ue001\ue0001\ue001\ue0009\ue001",
    "{{ '\\ue0000\\ue001' * 1000 }}",
    "\ue000999999999999999999999999\ue001",
    "{{ (" * 1000,
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "{{ " + "-" * 20000 + "1 }}",
    "{{ " + "not " * 20000 + "1 }}",
    "{{ " + "1 + " * 20000 + "1 }}",
    "{{ " + "x|upper" + "|upper" * 20000 + " }}",
    "{{ x" + ".y" * 20000 + " }}",
    "{{ x" + "[0]" * 20000 + " }}",
    "{% if a %}" * 2000 + "{% endif %}" * 2000,
    "{% for a in b %}" * 300 + "{% endfor %}" * 300,
    "{% if a %}" + "{% elif a %}" * 5000 + "{% endif %}",
    "{{ {" + "'a':{" * 500 + "}" * 500 + "} }}",
    "{% set a" + ", a" * 5000 + " = 1 %}",
    "{% macro f(" + ", ".join(f"a{number}" for number in range(3000)) + ") %}{% endmacro %}{{ f() }}",
    "{% macro messages() %}{% endmacro %}{{ messages() }}",
    "{{ messages[10**30] }}",
    "{{ messages[-1].content[::-1] }}",
    "{{ messages[1:999999999999999999999999] }}",
    "{{ 'x' is divisibleby 0 }}",
    "{{ messages is sameas messages }}",
    "{{ 1 if }}",
    "{{ 'a'.join(messages) }}",
    "{{ '%(x)s' % messages[0] }}",
    "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "{{ '{0[role]}'.format_map(messages) }}",
    "{{ dict(messages) }}",
    "{{ (1).__class__(10) }}",
    "{{ 0.1.hex() }}",
    "{{ (10).to_bytes(10**10, 'big') }}",
    "{{ bos_token.x.y }}",
    "{{ tools.x }}",
    "{{ namespace(messages) }}",
    "{{ joiner(1, 2, 3) }}",
    "{{ messages|tojson|safe|forceescape|xmlattr }}",
    "{{ {'a b': 1}|xmlattr }}",
    "{{ 'x'|format(1) }}",
    "{{ 'x'|filesizeformat }}",
    "{{ 'x'|indent('y' * 10**6) }}",
    "{{ x|default(x|default(x)) }}",
    "{% set messages = 5 %}{{ messages }}",
    "{% set bos_token = messages %}{{ bos_token }}",
    "{% with %}{% endwith %}",
    "{% do messages %}",
    "{% debug %}",
    "{% trans %}x{% endtrans %}",
    "{%- if messages|length > 3 -%}{{ 7**(9**9) }}{%- endif -%}",
    "{%- for m in messages if 'What' in m.content -%}{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}{%- endfor -%}",
    "{%- if '12345' in messages[0].content -%}{{ 1/0 }}{%- endif -%}",
    "{%- if '\ue000' not in messages[0].content -%}{{ 'a' * 10**8 }}{%- endif -%}",
)
ATOMS = (
    "messages",
    "messages[0]",
    "messages[-1].content",
    "message",
    "loop",
    "loop.index",
    "1",
    "-1",
    "'x'",
    "none",
    "true",
    "[]",
    "{}",
    "ns.x",
    "tools",
    "bos_token",
    "eos_token",
    "add_generation_prompt",
    "range(5)",
    "10**20",
    "'<|end|>'",
    "''",
    "(1,2)",
    "namespace",
    "cycler(1,2)",
    "raise_exception",
    "strftime_now",
    "undefined",
    "self",
    "caller",
    "varargs",
    "'\ue0001\ue001'",
)
FILTERS = [
    "abs",
    "attr('role')",
    "batch(2)",
    "capitalize",
    "center",
    "default('x')",
    "dictsort",
    "escape",
    "filesizeformat",
    "first",
    "float",
    "forceescape",
    "format",
    "groupby('role')",
    "indent",
    "int",
    "items",
    "join(',')",
    "last",
    "length",
    "list",
    "lower",
    "map('upper')",
    "max",
    "min",
    "pprint",
    "random",
    "reject",
    "replace('a','b')",
    "reverse",
    "round",
    "safe",
    "select",
    "selectattr('role')",
    "slice(2)",
    "sort",
    "string",
    "striptags",
    "sum",
    "title",
    "tojson",
    "trim",
    "truncate(3)",
    "unique",
    "upper",
    "urlencode",
    "urlize",
    "wordcount",
    "wordwrap",
    "xmlattr",
    "nosuchfilter",
]
OPERATORS = ("+", "-", "*", "/", "//", "%", "**", "~", "==", "<", ">=", "in", "not in", "and", "or", "is", ".", "|")


def expression(rng: random.Random, depth: int = 0) -> str:
    choice = rng.random()
    if depth > 3 or choice < 0.3:
        return rng.choice(ATOMS)
    if choice < 0.55:
        return f"({expression(rng, depth + 1)})|{rng.choice(FILTERS)}"
    if choice < 0.75:
        return f"({expression(rng, depth + 1)}) {rng.choice(OPERATORS)} ({expression(rng, depth + 1)})"
    if choice < 0.82:
        return f"({expression(rng, depth + 1)})[{expression(rng, depth + 1)}]"
    if choice < 0.88:
        return f"({expression(rng, depth + 1)})({expression(rng, depth + 1)})"
    if choice < 0.94:
        return f"({expression(rng, depth + 1)} if {expression(rng, depth + 1)} else {expression(rng, depth + 1)})"
    return f"({expression(rng, depth + 1)}).{rng.choice(('role', 'content', 'x', 'items()', 'split()', '__class__', 'strip()', 'format(1)'))}"


def program(rng: random.Random, depth: int = 0) -> str:
    pieces = []
    for _ in range(rng.randrange(1, 4)):
        inner = program(rng, depth + 1) if depth < 3 else "x"
        pieces.append(
            rng.choice(
                (
                    f"{{{{ {expression(rng)} }}}}",
                    f"{{% set ns = namespace(x={expression(rng)}) %}}{inner}",
                    f"{{% for message in {rng.choice(('messages', expression(rng)))} %}}{inner}{{% endfor %}}",
                    f"{{% if {expression(rng)} %}}{inner}{{% else %}}{inner}{{% endif %}}",
                    f"{{% set x = {expression(rng)} %}}",
                    "<|user|>{{ message.content }}<|end|>",
                    "{{ message['role'] }}\n{{ message['content'] }}</s>",
                    f"{{% generation %}}{inner}{{% endgeneration %}}",
                    rng.choice(("<s>", "</s>", "<|assistant|>", "\n", "\t", "\u202e", "\x1b[1m")),
                )
            )
        )
    return "".join(pieces)


def encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def template(seeds: Seeds, rng: random.Random, number: int) -> Case:
    own = seeds.model["chat_template.jinja"].decode()
    kind = rng.randrange(10)
    if number < len(BOMBS):
        bomb = BOMBS[number]
        text = bomb + own if number % 2 else USUAL + bomb
        name = f"bomb {number} {bomb[:60]!r}"
    elif kind < 4:
        text = program(rng)
        name = "random program"
    elif kind < 6:
        place = rng.choice([found.end() for found in re.finditer(r"%}|}}", own)])
        text = own[:place] + rng.choice((program(rng), rng.choice(BOMBS), "{{ " + expression(rng) + " }}")) + own[place:]
        name = "own template with something put in"
    elif kind < 8:
        text = broken(own.encode(), rng).decode("utf-8", "surrogateescape")
        name = "damaged template"
    else:
        text = rng.choice((USUAL, own)).replace(
            rng.choice(("message", "content", "role", "|", "{%", "<")), rng.choice(("x", "", "{{ 1/0 }}", "loop", "\x00")), rng.choice((1, -1))
        )
        name = "template with words replaced"
    if rng.random() < 0.85:
        try:
            data = encoded(text)
        except UnicodeEncodeError:
            data = text.encode("utf-8", "replace")
        return on_model(name, rng, {"chat_template.jinja": data})
    config = json.loads(seeds.model["tokenizer_config.json"])
    config["chat_template"] = rng.choice(
        (text, [{"name": "default", "template": text}], [{"name": "a", "template": text}, {"name": "a"}], {"default": text}, [text], 5, "", {}, [])
    )
    files: dict[str, Content] = {"chat_template.jinja": Gone(), "tokenizer_config.json": as_json(config)}
    if rng.random() < 0.2:
        files["additional_chat_templates/default.jinja"] = encoded(own)
    return on_model(f"{name} in tokenizer_config.json", rng, files)


# Tokenizers.

REGEXES = (
    "(?:.|..)+\\x00",
    "(a+)+$",
    "(?:\\w|\\w\\w)+\\x01",
    "(.*)*(.*)*(.*)*x\\x01",
    "(",
    "",
    "\\p{Nope}",
    "(?<=a*)b",
    "[\\x{110000}]",
    "(?i)" + "a?" * 30 + "a" * 30,
    "(?:" * 3000 + ")" * 3000,
    ".{1,100000}.{1,100000}",
    "\\d(?:.|..)+\\x00",
    "^",
    "$",
    "(?=.)",
    "\\G",
    "x*",
)


def _parts(rng: random.Random) -> list[Any]:
    """Parts of a tokenizer that are at home in some place of its file."""
    regex = {rng.choice(("Regex", "String")): rng.choice(REGEXES)}
    return [
        {"type": "Replace", "pattern": regex, "content": rng.choice(("", "a", "aa" * 1000, "\0", "<s>"))},
        {
            "type": "Split",
            "pattern": regex,
            "behavior": rng.choice(("Isolated", "Removed", "MergedWithNext", "Contiguous")),
            "invert": rng.random() < 0.5,
        },
        {"type": "Precompiled", "precompiled_charsmap": rng.choice(("", "AAAA", "/////wAA", "ALQCAACEAAAAAACAAQ==", "x"))},
        {"type": "Prepend", "prepend": rng.choice(("", "▁", "a" * 10_000))},
        {"type": "Strip", "content": rng.choice(("a", "", "ab")), "start": rng.choice((0, 1 << 31, 1)), "stop": rng.choice((0, 5, 1 << 40))},
        {
            "type": "Metaspace",
            "replacement": rng.choice(("", "▁", "ab")),
            "prepend_scheme": rng.choice(("always", "never", "first", "x")),
            "split": True,
        },
        {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": rng.random() < 0.5},
        {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "[X]", "type_id": 0}}], "pair": [], "special_tokens": {}},
        {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 1 << 31}}] * 1000, "pair": [], "special_tokens": {}},
        {"type": "BertProcessing", "sep": ["x", 1 << 31], "cls": ["", 0]},
        {
            "type": "Sequence",
            rng.choice(("normalizers", "pretokenizers", "decoders", "processors")): [{"type": rng.choice(("NFC", "Lowercase", "Fuse", "Digits"))}]
            * 100,
        },
        {"type": "CTC", "pad_token": "", "word_delimiter_token": "", "cleanup": True},
        {"type": "WordPiece", "prefix": "", "cleanup": True},
        {"type": "BPEDecoder", "suffix": ""},
        {"type": "UnicodeScripts"},
        {"type": "FixedLength", "length": rng.choice((0, 1, 1 << 40))},
        {"type": "Punctuation", "behavior": "Removed"},
        {"type": "CharDelimiterSplit", "delimiter": "l"},
        {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True, "strip_accents": None, "lowercase": True},
        {"type": "Truncation"},
        None,
    ]


MODELS: tuple[Any, ...] = (
    {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "missing"},
    {"type": "WordLevel", "vocab": {}, "unk_token": ""},
    {"type": "WordPiece", "vocab": {"a": 0, "[UNK]": 1}, "unk_token": "[UNK]", "continuing_subword_prefix": "", "max_input_chars_per_word": 0},
    {"type": "WordPiece", "vocab": {"a": 0}, "unk_token": "[UNK]", "continuing_subword_prefix": "##", "max_input_chars_per_word": 1 << 40},
    {"type": "Unigram", "unk_id": 5, "vocab": [["a", -1.0]]},
    {"type": "Unigram", "unk_id": None, "vocab": [["a", -1.0], ["b", float("-1e308")]]},
    {"type": "Unigram", "unk_id": 0, "vocab": [["", 0.0], ["a", 0.0]], "byte_fallback": True},
    {"type": "Unigram", "unk_id": 0, "vocab": []},
    {"type": "BPE", "vocab": {}, "merges": []},
    {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": ["a b"]},
    {"type": "BPE", "vocab": {"a": 0, "ab": 4294967295, "b": 1}, "merges": [["a", "b"]], "unk_token": "u"},
    {"type": "BPE", "vocab": {"a": 0}, "merges": [], "dropout": 0.5},
    {
        "type": "BPE",
        "vocab": {"a": 0},
        "merges": [],
        "dropout": 7.0,
        "unk_token": "a",
        "fuse_unk": True,
        "byte_fallback": True,
        "ignore_merges": True,
    },
    {"type": "Nope"},
)


def tokenizer(seeds: Seeds, rng: random.Random, _number: int) -> Case:
    base = rng.choice(seeds.real) if seeds.real and rng.random() < 0.25 else seeds.model
    small = len(base["tokenizer.json"]) < 1 << 20
    files: dict[str, Content] = (
        {}
        if base is seeds.model
        else {name: data for name, data in base.items() if name not in ("LICENSE", "config.json", "model.safetensors", "generation_config.json")}
    )
    commands = MODEL_COMMANDS if small else MODEL_COMMANDS[:2]
    kind = rng.randrange(12)
    if kind == 0:
        name = rng.choice([name for name in base if "token" in name or "vocab" in name])
        files[name] = broken(base[name], rng)
        return on_model(f"bytes of {name}", rng, files, commands)
    if kind == 1:
        name = rng.choice(
            ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model")
        )
        files[name] = special(rng)
        return on_model(f"{name} is {files[name]!r}"[:80], rng, files, commands)
    if kind in (2, 3, 4):
        config = json.loads(base["tokenizer_config.json"])
        keys = [
            "tokenizer_class",
            "bos_token",
            "eos_token",
            "unk_token",
            "pad_token",
            "model_max_length",
            "added_tokens_decoder",
            "extra_special_tokens",
            "additional_special_tokens",
            "auto_map",
            "chat_template",
            "clean_up_tokenization_spaces",
            "padding_side",
            "truncation_side",
            "fix_mistral_regex",
            "legacy",
            "tokenizer_file",
            "vocab_file",
            "merges_file",
            "backend",
            "name_or_path",
            "add_prefix_space",
            "add_bos_token",
            "add_eos_token",
            "split_special_tokens",
            "model_input_names",
            "processor_class",
            "from_slow",
            "local_files_only",
            "trust_remote_code",
            "special_tokens_map_file",
            "_commit_hash",
            "is_local",
            "gguf_file",
            "subfolder",
            "errors",
            "do_lower_case",
            "sp_model_kwargs",
            "tokenizer_object",
            "__class__",
            "self",
            "init_inputs",
            "response_schema",
            "model_specific_special_tokens",
        ]
        for _ in range(rng.choice((1, 1, 2, 4))):
            key = rng.choice(keys)
            config[key] = rng.choice(
                (
                    nasty(rng),
                    nasty(rng),
                    {"0": {"content": rng.choice(TEXTS), "special": True, "lstrip": 5}},
                    {"__type": "AddedToken", "content": rng.choice(TEXTS[:8]), "special": True, "normalized": False},
                    rng.choice(
                        (
                            "PreTrainedTokenizerFast",
                            "LlamaTokenizer",
                            "T5Tokenizer",
                            "BertTokenizer",
                            "ByT5Tokenizer",
                            "Qwen2Tokenizer",
                            "MistralCommonTokenizer",
                            "TokenizersBackend",
                            "AutoTokenizer",
                            "CanineTokenizer",
                            "GPT2Tokenizer",
                            "BertJapaneseTokenizer",
                            "object",
                        )
                    ),
                    {"AutoTokenizer": ["x.Y", None]},
                    ["<s>", None, {"content": "<x>", "__type": "AddedToken"}],
                )
            )
        files["tokenizer_config.json"] = as_json(config)
        return on_model("values of tokenizer_config.json", rng, files, commands)
    if kind == 5:
        name = rng.choice(
            (
                "special_tokens_map.json",
                "added_tokens.json",
                "vocab.json",
                "merges.txt",
                "vocab.txt",
                "tokenizer.model",
                "spiece.model",
                "sentencepiece.bpe.model",
            )
        )
        old = base.get(name, b'{"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": false}, "x": 1}')
        files[name] = (
            broken(old, rng)
            if rng.random() < 0.5
            else as_json(shaken({"bos_token": "<s>", "eos_token": {"content": "</s>"}, "additional_special_tokens": ["<x>"], "<y>": 5}, rng))
        )
        if rng.random() < 0.5:
            files["tokenizer.json"] = Gone()
        return on_model(f"{name} beside", rng, files, commands)
    settings = json.loads(base["tokenizer.json"])
    if kind in (6, 7):
        for _ in range(rng.choice((1, 1, 2))):
            place = rng.choice(("normalizer", "pre_tokenizer", "post_processor", "decoder"))
            part = rng.choice(_parts(rng))
            settings[place] = (
                part
                if rng.random() < 0.5 or settings.get(place) is None
                else {
                    "type": "Sequence",
                    {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "post_processor": "processors", "decoder": "decoders"}[place]: [
                        part,
                        settings[place],
                    ],
                }
            )
        name = "parts of tokenizer.json"
    elif kind == 8:
        token = {
            "id": rng.choice((0, 1, 5, 300, 511, 512, 10**6, (1 << 32) - 1)),
            "content": rng.choice((*TEXTS[:6], "<s>", "a", "\n", "x" * 1000, "What")),
            "single_word": rng.random() < 0.5,
            "lstrip": rng.random() < 0.5,
            "rstrip": rng.random() < 0.5,
            "normalized": rng.random() < 0.5,
            "special": rng.random() < 0.5,
        }
        settings["added_tokens"] = rng.choice(
            (
                settings["added_tokens"] + [token],
                [token],
                [token, token],
                [{**token, "content": f"t{index}", "id": 600 + index} for index in range(3000)],
                [],
            )
        )
        name = "added tokens"
    elif kind == 9:
        settings["model"] = copy.deepcopy(rng.choice(MODELS))
        name = "another model in tokenizer.json"
    elif kind == 10:
        settings[rng.choice(("truncation", "padding"))] = rng.choice(
            (
                {"direction": "Right", "max_length": rng.choice((0, 1, 1 << 40)), "strategy": "LongestFirst", "stride": rng.choice((0, 5, 1 << 40))},
                {
                    "strategy": {"Fixed": rng.choice((10, 1 << 31, 1 << 40))},
                    "direction": "Left",
                    "pad_to_multiple_of": rng.choice((None, 0, 1 << 40)),
                    "pad_id": 0,
                    "pad_type_id": 0,
                    "pad_token": "x",
                },
                {"strategy": "BatchLongest", "direction": "Right", "pad_to_multiple_of": 0, "pad_id": 1 << 31, "pad_type_id": 0, "pad_token": ""},
                nasty(rng),
            )
        )
        name = "truncation and padding"
    else:
        settings = shaken(settings, rng)
        name = "values of tokenizer.json"
    files["tokenizer.json"] = as_json(settings)
    return on_model(name, rng, files, commands)


# Weights.


def _split(data: bytes) -> tuple[Any, bytes]:
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def _joined(header: Any, body: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def weights(data: bytes, rng: random.Random) -> tuple[str, Content]:
    """A safetensors file, damaged in one of many ways."""
    header, body = _split(data)
    names = [name for name in header if name != "__metadata__"]
    name = rng.choice(names)
    kind = rng.randrange(16)
    if kind == 0:
        return "length of the header", struct.pack(
            "<Q", rng.choice((0, 1, 7, 1 << 20, 1 << 31, 1 << 40, (1 << 64) - 1, len(data), len(data) - 8))
        ) + data[8:]
    if kind == 1:
        return "bytes of the header", data[:8] + broken(data[8:400], rng) + data[400:]
    if kind == 2:
        return "cut off", data[: rng.randrange(len(data))]
    if kind == 3:
        return "values of the header", _joined(shaken(header, rng), body)
    if kind == 4:
        header[name]["dtype"] = rng.choice(
            ["F64", "F16", "BF16", "I64", "I32", "I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "F6_E2M3", "C64", "U64", "x"]
        )
        return "another dtype", _joined(header, body)
    if kind == 5:
        shape = header[name]["shape"]
        header[name]["shape"] = rng.choice((shape[::-1], [*shape, 1], [1 << 62, 4], [0], [], [-1], [shape[0] * shape[-1]] if shape else [1]))
        return "another shape", _joined(header, body)
    if kind == 6:
        start, end = header[name]["data_offsets"]
        header[name]["data_offsets"] = rng.choice(
            ([end, start], [start, end + 4], [0, end - start], [-4, 0], [1 << 63, 1 << 64], [start, start], [len(body), len(body) + end - start])
        )
        return "other offsets", _joined(header, body)
    if kind == 7:
        header[rng.choice(("x", "model.layers.0.self_attn.q_proj.weight\x1b[31m", "a" * 100_000, "", "../../x", "\u202e", name.upper()))] = (
            header.pop(name)
        )
        return "another name", _joined(header, body)
    if kind == 8:
        del header[name]
        return "a weight is gone", _joined(header, body)
    if kind == 9:
        for index in range(rng.choice((3, 5000))):
            header[f"extra.{index}"] = {"dtype": "F32", "shape": [0], "data_offsets": [len(body), len(body)]}
        return "more weights", _joined(header, body)
    if kind == 10:
        header["__metadata__"] = rng.choice(
            ({}, {"format": "tf"}, {"format": "flax"}, {"format": 5}, [], "x", {"a": "x" * 10**6}, {"format": "pt", "\x1b": "\x1b[2J"}, None)
        )
        return "metadata", _joined(header, body)
    if kind == 11:
        value = rng.choice((b"\xff\xff\xff\x7f", b"\0\0\x80\x7f", b"\0\0\x80\xff", b"\xff\xff\x7f\x7f"))
        place = rng.randrange(max(1, len(body) // 4)) * 4
        return "a weight that is not finite", data[: len(data) - len(body)] + body[:place] + value * 64 + body[place + 256 :]
    if kind == 12:
        return "no safetensors", rng.choice(
            (
                b"",
                b"\0" * 8,
                b"\x80\x04.",
                b"PK\x03\x04" + bytes(100),
                b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
                b"<html>",
                rng.randbytes(1000),
            )
        )
    if kind == 13:
        return "no file", special(rng)
    if kind == 14:
        text = json.dumps(header)
        return "a header with a key twice", struct.pack("<Q", len(text) * 2 - 1) + (text[:-1] + "," + text[1:]).encode() + body
    deep = b'{"a":' * rng.choice((100, 100_000)) + b"1" + b"}" * 100
    return "a deep header", struct.pack("<Q", len(deep)) + deep + body


def safetensors(seeds: Seeds, rng: random.Random, _number: int) -> Case:
    if rng.random() < 0.75:
        name, content = weights(seeds.model["model.safetensors"], rng)
        return on_model(name, rng, {"model.safetensors": content})
    header, body = _split(seeds.model["model.safetensors"])
    names = [name for name in header if name != "__metadata__"]
    index: Any = {"metadata": {"total_size": len(body)}, "weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
    files: dict[str, Content] = {"model.safetensors": Gone(), "model-00001-of-00001.safetensors": seeds.model["model.safetensors"]}
    kind = rng.randrange(6)
    if kind == 0:
        index = shaken(index, rng)
    elif kind == 1:
        index["weight_map"][rng.choice(names)] = rng.choice(
            (
                "../../../beside/canary.txt",
                "/etc/passwd",
                "missing.safetensors",
                "config.json",
                "x.bin",
                "",
                ".",
                "a/b.safetensors",
                "\0.safetensors",
                "..",
                "..safetensors",
            )
        )
    elif kind == 2:
        name, files["model-00001-of-00001.safetensors"] = weights(seeds.model["model.safetensors"], rng)
    elif kind == 3:
        files["model.safetensors"] = weights(seeds.model["model.safetensors"], rng)[1]
    elif kind == 4:
        index["weight_map"] = {f"extra.{place}": "model-00001-of-00001.safetensors" for place in range(2000)}
    data = as_json(index)
    files["model.safetensors.index.json"] = broken(data, rng) if kind == 5 else data
    return on_model(f"index, {kind}", rng, files)


# Adapters.

ADAPTER_COMMANDS: tuple[tuple[int, str, tuple[str, ...]], ...] = (
    (6, "tools.chat", ("--prompt", "What is 1 + 1?", "--max-new-tokens", "3")),
    (2, "stages.predict", TUNED),
    (3, "tools.merge", ("--dtype", "float32", "--num-examples", "2")),
    (2, "stages.train", TRAIN),
    (1, "tools.publish", ("--repo-id", "org/name", "--dry-run")),
    (1, "tools.verify", ()),
    (1, "tools.doctor", ()),
    (1, "tools.card", ()),
)
PATTERNS = (
    "(([a-z_0-9]+)+\\.?)+!",
    "(.*)*(.*)*(.*)*(.*)*!",
    "(",
    ".*",
    "",
    "all-linear",
    "[",
    "a" * 100_000,
    "(?P<x>a)(?P<x>b)",
    "\\1",
    "(a|a)*" * 20 + "!",
    "(?:[a-z]+[._]?)+\\d+!",
    "^(?:[a-z._0-9]|[a-z])+$!",
)
STRANGE: dict[str, tuple[Any, ...]] = {
    "r": (0, -1, 1 << 40, 1.5, "16", None, True, 10**30, 1 << 24),
    "lora_alpha": (0, float("nan"), float("inf"), -1, "x", None, 1e308),
    "lora_dropout": (-1, 2, "x", float("nan")),
    "target_modules": (*PATTERNS, [], ["x"], [None], {}, 5, ["q_proj"] * 10_000, ["lm_head", "embed_tokens"], None),
    "exclude_modules": PATTERNS,
    "layers_pattern": (*PATTERNS, [None], 5),
    "layers_to_transform": (0, [0], [-1], [10**9], "x", list(range(10_000)), [None]),
    "rank_pattern": (
        {PATTERNS[0]: 8},
        {PATTERNS[1]: 8},
        {"(": 1},
        {"q_proj": -1},
        {"q_proj": 1 << 40},
        [],
        "x",
        {"q_proj": "x"},
        {"": 4},
        {".*": None},
    ),
    "alpha_pattern": ({PATTERNS[0]: 8}, {"(": 1}, {"q_proj": float("nan")}, {"q_proj": "x"}, [], 5),
    "modules_to_save": (["lm_head"], ["embed_tokens"], ["x"], [""], "lm_head", [None], {}, ["model"], ["norm"]),
    "layer_replication": ([[0, 1_000_000]], [[0, 50]] * 100, [[1, 0]], [[-5, 5]], "x", [[0]], [[None, None]], [[0, 2**40]]),
    "init_lora_weights": (
        "gaussian",
        "pissa",
        "pissa_niter_1000000000",
        "pissa_niter_x",
        "olora",
        "eva",
        "loftq",
        "corda",
        "orthogonal",
        "x",
        5,
        None,
        [],
        "lora_ga",
    ),
    "use_dora": (True, "x"),
    "use_rslora": (True, "x"),
    "use_qalora": (True,),
    "use_bdlora": (True, {"x": 1}, 5),
    "bias": ("all", "lora_only", "x", 5, None),
    "fan_in_fan_out": (True, "x"),
    "peft_type": ("LOHA", "IA3", "PROMPT_TUNING", "XLORA", "x", None, 5, [], "POLY", "ADALORA"),
    "task_type": ("SEQ_CLS", "x", None, 5, "TOKEN_CLS", "SEQ_2_SEQ_LM", "QUESTION_ANS", "FEATURE_EXTRACTION"),
    "base_model_name_or_path": ("", None, "/etc", "models/base/other", "\x1b[2J", 5, "a" * 100_000, "../../beside"),
    "auto_mapping": ({"base_model_class": "system", "parent_library": "os"}, [], "x"),
    "megatron_config": ({"x": 1}, None, []),
    "trainable_token_indices": ([0, 1], [-1], [10**9], {"embed_tokens": [1]}, {"x": [1]}, "x", [None]),
    "target_parameters": (["x"], ["model.embed_tokens.weight"], [""], "x", [None], PATTERNS[0]),
    "loftq_config": ({"loftq_bits": 4}, "x", []),
    "eva_config": ({"rho": 1}, "x"),
    "corda_config": ({"cache_file": "/etc/passwd"}, "x"),
    "arrow_config": ({"x": 1}, {"top_k": 3, "router_temperature": 1.0}, "x"),
    "alora_invocation_tokens": ([], [1], ["x"], 5),
    "runtime_config": ({"ephemeral_gpu_offload": True}, "x"),
    "lora_bias": (True, "x"),
    "lora_ga_config": ({"x": 1}, "x"),
    "ensure_weight_tying": (True,),
    "inference_mode": (False, "x"),
    "revision": ("x", 5, "../.."),
    "peft_version": ("999.0", 5, "x", None),
    "qalora_group_size": (0, -1),
    "velora_config": ({"x": 1}, 5),
    "monteclora_config": ({"x": 1}, 5),
    "subfolder": ("../..",),
    "self": (1,),
    "__class__": ("x",),
    "nosuchkey": (1, {}),
}


def adapter(seeds: Seeds, rng: random.Random, number: int) -> Case:
    files: dict[str, Content] = {}
    kind = rng.randrange(10)
    config = json.loads(seeds.adapter["adapter_config.json"])
    flat = [(key, value) for key, values in STRANGE.items() for value in values]
    if number < len(flat):
        key, value = flat[number]
        files["adapter_config.json"] = as_json({**config, key: value})
        name = f"{key} = {str(value)[:60]!r}"
    elif kind == 0:
        files["adapter_config.json"] = broken(seeds.adapter["adapter_config.json"], rng)
        name = "bytes of the config"
    elif kind in (1, 2):
        files["adapter_config.json"] = as_json(shaken(config, rng))
        name = "values of the config"
    elif kind in (3, 4):
        chosen = [rng.choice(flat) for _ in range(rng.choice((1, 2, 3)))]
        files["adapter_config.json"] = as_json({**config, **dict(chosen)})
        name = f"config: {str(chosen)[:80]}"
    elif kind in (5, 6, 7):
        what, files["adapter_model.safetensors"] = weights(seeds.adapter["adapter_model.safetensors"], rng)
        name = f"weights: {what}"
    elif kind == 8:
        file = rng.choice(sorted(seeds.adapter))
        files[file] = special(rng)
        name = f"{file} is {files[file]!r}"[:80]
    else:
        file = rng.choice(
            (
                "adapter_model.bin",
                "tokenizer.json",
                "tokenizer_config.json",
                "chat_template.jinja",
                "x.py",
                "README.md",
                "a/b",
                "adapter.json",
                "\x1b[2J.txt",
            )
        )
        files[file] = broken(seeds.adapter.get(file, b"\x80\x04cos\nsystem\n."), rng)
        name = f"{file!r} beside"
    # Of a training: an adapter that it begins from.
    _, module, arguments = rng.choices(ADAPTER_COMMANDS, [weight for weight, *_ in ADAPTER_COMMANDS])[0]
    placed = {f"{ADAPTER}/{file}": content for file, content in files.items()}
    if module == "stages.train":
        whole: dict[str, Content] = {**seeds.adapter, **files}
        placed = {f"data/start/{file}": content for file, content in whole.items()}
        content = whole["adapter_model.safetensors"]
        digest = hashlib.sha256(content if isinstance(content, bytes) else b"").hexdigest()
        text = seeds.read("params.yaml").decode()
        text = re.sub(r"init_adapter: null", "init_adapter: data/start", text)
        placed["params.yaml"] = re.sub(r"init_adapter_sha256: null", f"init_adapter_sha256: {digest}", text).encode()
    locked = [ADAPTER] if rng.random() < 0.9 and not any(isinstance(content, Link | Fifo) for content in placed.values()) else []
    return Case(name, module, arguments, placed, lock=locked if module != "stages.train" else [])


# The model's config.

CONFIG_VALUES: dict[str, tuple[Any, ...]] = {
    "model_type": (
        "mamba",
        "gpt2",
        "bert",
        "t5",
        "mixtral",
        "qwen3",
        "gemma3",
        "deepseek_v3",
        "gpt_oss",
        "x",
        "",
        None,
        5,
        "auto",
        "llava",
        "whisper",
        "timm_wrapper",
        "encoder-decoder",
        "bark",
        "rag",
        "mistral",
        "qwen2_vl",
        "rwkv",
        "nemotron_h",
    ),
    "architectures": (["BertModel"], [], None, "x", ["../x"], [5]),
    "hidden_size": (0, -1, 1 << 40, 7, "x", None, 1.5),
    "num_hidden_layers": (0, -1, 999, 10**9, "x", None, 1.5, True),
    "num_attention_heads": (0, -1, 7, 1 << 40, None, "x"),
    "num_key_value_heads": (0, -1, 3, 1 << 40, "x"),
    "head_dim": (0, -1, 1 << 40, "x", 1),
    "intermediate_size": (0, -1, 1 << 40, "x"),
    "vocab_size": (0, -1, 1 << 40, 1, "x", None, 600),
    "max_position_embeddings": (0, -1, 1 << 60, "x", None, 1),
    "rope_theta": (0, -1, float("nan"), "x", 1e308),
    "rope_scaling": (
        {"type": "linear", "factor": 0},
        {"rope_type": "yarn", "factor": -1},
        {"rope_type": "x"},
        {"rope_type": "longrope"},
        "x",
        [],
        {"rope_type": "llama3", "factor": float("nan")},
    ),
    "rope_parameters": (
        {},
        {"rope_type": "dynamic", "factor": 0, "rope_theta": 1},
        {"rope_type": "yarn"},
        "x",
        {"full_attention": {}},
        {"rope_type": "default", "rope_theta": 0},
    ),
    "hidden_act": ("x", "eval", None, 5, [], "silu_and_mul"),
    "rms_norm_eps": (0, -1, float("nan"), "x", None),
    "tie_word_embeddings": (True, False, "x", None),
    "torch_dtype": ("float8_e4m3fn", "int8", 5, "x", "nn", "bool", None, {"x": "y"}),
    "dtype": ("float8_e4m3fn", "int8", 5, "x", "nn", "complex64"),
    "pad_token_id": (10**9, -1, "x", -(10**9)),
    "bos_token_id": (10**9, -1, "x", []),
    "eos_token_id": (10**9, -1, "x", [], list(range(10_000)), [None], {}),
    "quantization_config": (
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "awq"},
        {"quant_method": "bitsandbytes"},
        {"quant_method": "fp8"},
        {"quant_method": "x"},
        {},
        [],
        "x",
        {"quant_method": "compressed-tensors"},
        {"quant_method": 5},
        {"load_in_4bit": True},
        {"quant_method": "torchao"},
        {"quant_method": "mxfp4"},
        {"quant_method": "quark"},
    ),
    "auto_map": ({"AutoConfig": "x.Y", "AutoModelForCausalLM": "x.Z"}, {"AutoConfig": "other/repo--x.Y"}, [], "x"),
    "transformers_weights": ("x.bin", "../x.safetensors", "missing.safetensors", 5, ["x"]),
    "attn_implementation": ("x", "kernels-community/flash-attn", 5),
    "_attn_implementation": ("x", "flash_attention_2", "kernels-community/flash-attn"),
    "_attn_implementation_internal": ("kernels-community/flash-attn", "x"),
    "experts_implementation": ("x",),
    "text_config": ({}, {"vocab_size": 5}, None, "x", [], {"text_config": {}}),
    "is_encoder_decoder": (True, "x"),
    "layer_types": (["sliding_attention"], ["x"] * 4, "x", [None]),
    "sliding_window": (0, -1, "x"),
    "attention_dropout": (-1, 2, "x"),
    "attention_bias": (True, "x"),
    "mlp_bias": (True,),
    "use_cache": (False, "x"),
    "pretraining_tp": (0, 7, "x"),
    "initializer_range": (float("nan"), -1, "x"),
    "output_hidden_states": (True, "x"),
    "return_dict": (False,),
    "problem_type": ("x",),
    "id2label": ({"x": "y"}, [], {"0": None}),
    "num_labels": (-1, 10**7, "x"),
    "adapter_path": ("/etc", "x"),
    "transformers_version": (5, "x", "999.0"),
    "name_or_path": (5, "/etc"),
    "_name_or_path": (5,),
    "chunk_size_feed_forward": (1, -1, "x"),
    "base_model_tp_plan": ({"x": "y"},),
    "__class__": ("x",),
    "self": (1,),
    "get_text_config": ("x",),
    "to_dict": (1,),
    "label2id": ("x",),
    "per_layer_config": ({"0": {"hidden_size": 1}}, "x"),
}
GENERATION_VALUES: dict[str, tuple[Any, ...]] = {
    "eos_token_id": (10**9, -1, "x", [], [None], list(range(300)), {}, True),
    "pad_token_id": (10**9, -1, "x", None),
    "max_length": (0, -1, 1 << 60, "x"),
    "max_new_tokens": (0, -1, 1 << 60, "x"),
    "min_new_tokens": (1 << 60, -1),
    "num_beams": (0, 10**9, -1, "x"),
    "num_return_sequences": (10**6, 0),
    "temperature": (0, -1, "x", float("nan")),
    "top_k": (0, -1, 1 << 60, "x"),
    "top_p": (0, 2, -1, "x"),
    "do_sample": (True, "x"),
    "cache_implementation": ("static", "offloaded", "quantized", "x", 5),
    "custom_generate": ("x", "/etc", "org/name"),
    "suppress_tokens": ([10**9], "x", list(range(300))),
    "begin_suppress_tokens": ([0], "x"),
    "forced_eos_token_id": (10**9, "x"),
    "forced_bos_token_id": (10**9,),
    "bad_words_ids": ([[10**9]], "x", [[]], []),
    "sequence_bias": ({"x": 1}, [[[0], 1e308]], "x"),
    "stop_strings": (["a"], "x", [""], 5),
    "max_time": (0, -1, "x"),
    "watermarking_config": ({}, {"greenlist_ratio": 5}, "x"),
    "compile_config": ({}, {"backend": "x"}, "x"),
    "prompt_lookup_num_tokens": (5, "x"),
    "penalty_alpha": (0.5,),
    "guidance_scale": (2.0, "x"),
    "repetition_penalty": (0, -1, "x", float("nan")),
    "no_repeat_ngram_size": (1, "x"),
    "assistant_early_exit": (1,),
    "dola_layers": ("low",),
    "return_dict_in_generate": (False,),
    "output_scores": (True,),
    "transformers_version": (5, "x"),
    "token_healing": (True,),
    "continuous_batching_config": ({"x": 1}, "x"),
    "cache_config": ({"backend": "x"}, "x"),
    "encoder_no_repeat_ngram_size": (3,),
    "exponential_decay_length_penalty": ([0, 1e308], "x"),
    "constraints": (["x"], "x"),
    "__class__": ("x",),
    "self": (1,),
}


def model(seeds: Seeds, rng: random.Random, _number: int) -> Case:
    file = rng.choice(("config.json", "config.json", "generation_config.json"))
    record = json.loads(seeds.model[file])
    kind = rng.randrange(8)
    values = CONFIG_VALUES if file == "config.json" else GENERATION_VALUES
    content: Content
    if kind == 0:
        content, name = broken(seeds.model[file], rng), f"bytes of {file}"
    elif kind == 1:
        content, name = as_json(shaken(record, rng)), f"values of {file}"
    elif kind == 2 and rng.random() < 0.4:
        content, name = special(rng), f"{file} is no file"
    else:
        chosen = {key: rng.choice(values[key]) for key in rng.sample(sorted(values), rng.choice((1, 1, 1, 2, 3)))}
        content, name = as_json({**record, **chosen}), f"{file}: {str(chosen)[:80]}"
    files: dict[str, Content] = {file: content}
    if rng.random() < 0.05:
        files["adapter_config.json"] = as_json({"peft_type": "LORA", "base_model_name_or_path": "x"})
    return on_model(name, rng, files)


# The project's own files.

PROJECT_FILES = (
    "models/base/tiny.json",
    "dvc.lock",
    "dvc.lock",
    "dvc.yaml",
    "params.yaml",
    "params.yaml",
    "recipes/tiny-cpu.yaml",
    "recipes/qwen2.5-0.5b-cpu.yaml",
    "recipes/shapes/llama3-8b-instruct.json",
    ".dvc/config",
    ".dvc/config.local",
    ".dvcignore",
    "requirements.txt",
    "models/card.yaml",
    "reports/train.json",
    "reports/evaluation.json",
    "reports/prepare.json",
    "reports/environment.json",
    "reports/reproduction.json",
    "metrics/evaluate.json",
    "metrics/train_loss.csv",
    "metrics/environment.json",
    "metrics/merge.json",
    "data/predictions/base.jsonl",
    "data/predictions/tuned_counts.json",
    "data/prepared/test.jsonl",
    "data/prepared/train.jsonl",
    "data/raw/micro/train.jsonl",
    ".dvc/tmp/written.json",
    ".dvc/tmp/verified.json",
    ".dvc/tmp/inputs.json",
)
READERS: dict[str, tuple[tuple[str, tuple[str, ...]], ...]] = {
    "models/base": (
        ("tools.check", ()),
        ("tools.chat", ("--base", "--prompt", "a")),
        ("tools.doctor", ()),
        ("tools.verify", ()),
        ("tools.preflight", ()),
        ("tools.publish", ("--repo-id", "org/name", "--dry-run")),
        ("tools.pin", ("tiny", "--path", MODEL)),
        ("stages.predict", BASELINE),
    ),
    "dvc.lock": (
        ("tools.verify", ()),
        ("tools.doctor", ()),
        ("tools.doctor", ("--commands",)),
        ("tools.card", ("--check",)),
        ("tools.merge", ("--dtype", "float32", "--num-examples", "2")),
        ("tools.verify", ("--rerun", "nostage")),
        ("tools.chat", ("--prompt", "a")),
        ("stages.evaluate", EVALUATE),
        ("tools.publish", ("--repo-id", "org/name", "--dry-run")),
        ("tools.compare", ("HEAD",)),
    ),
    "dvc.yaml": (
        ("tools.verify", ()),
        ("tools.doctor", ()),
        ("tools.card", ()),
        ("stages.predict", BASELINE),
        ("tools.verify", ("--rerun", "nostage")),
        ("stages.train", TRAIN),
    ),
    "params.yaml": (
        ("tools.check", ()),
        ("tools.doctor", ()),
        ("tools.recipes", ("use", "tiny-cpu")),
        ("tools.preflight", ()),
        ("tools.inspect", ("--count", "1")),
        ("tools.check", ("-S", "train.seed=1")),
        ("stages.prepare", PREPARE),
        ("tools.compare", ("HEAD",)),
        ("tools.verify", ()),
        ("tools.recipes", ("flags", "tiny-cpu")),
    ),
    "recipes": (
        ("tools.recipes", ("list",)),
        ("tools.recipes", ("show", "tiny-cpu")),
        ("tools.recipes", ("use", "tiny-cpu")),
        ("tools.recipes", ("flags", "tiny-cpu")),
        ("tools.doctor", ()),
        ("tools.preflight", ("--recipe", "qwen2.5-0.5b-cpu")),
        ("tools.preflight", ("--recipe", "llama3-8b-rtx4090", "--memory", "24")),
    ),
    ".dvc": (
        ("tools.verify", ()),
        ("tools.doctor", ()),
        ("tools.chat", ("--prompt", "a")),
        ("tools.merge", ("--dtype", "float32", "--num-examples", "2")),
        ("tools.card", ()),
        ("stages.evaluate", EVALUATE),
        ("tools.check", ()),
    ),
    "requirements.txt": (("tools.check", ()), ("tools.doctor", ()), ("stages.evaluate", EVALUATE), ("tools.card", ())),
    "models/card.yaml": (("tools.card", ()), ("tools.card", ("--check",)), ("tools.publish", ("--repo-id", "org/name", "--dry-run"))),
    "reports": (
        ("tools.card", ()),
        ("tools.card", ("--check",)),
        ("tools.verify", ()),
        ("stages.evaluate", EVALUATE),
        ("tools.doctor", ()),
        ("tools.publish", ("--repo-id", "org/name", "--dry-run")),
    ),
    "metrics": (
        ("tools.card", ()),
        ("stages.evaluate", EVALUATE),
        ("tools.merge", ("--dtype", "float32", "--num-examples", "2")),
        ("tools.card", ("--check",)),
    ),
    "data/predictions": (("stages.evaluate", EVALUATE), ("tools.compare", ("HEAD",)), ("tools.compare", ("--all",)), ("tools.card", ())),
    "data/prepared": (
        ("tools.inspect", ("--count", "2")),
        ("tools.chat", ("--from-test", "2")),
        ("stages.predict", BASELINE),
        ("stages.train", TRAIN),
        ("stages.evaluate", EVALUATE),
        ("tools.merge", ("--dtype", "float32", "--num-examples", "2")),
    ),
    "data/raw": (("stages.prepare", PREPARE), ("tools.check", ()), ("tools.verify", ()), ("tools.doctor", ())),
    ".dvcignore": (("tools.verify", ()), ("tools.doctor", ()), ("tools.chat", ("--prompt", "a"))),
}
YAML_PIECES = (
    "&a [*a]",
    "&a {x: *a}",
    "*nowhere",
    "!!python/object/apply:os.system [id]",
    "!!binary x",
    "!!set {a, b}",
    "!!omap [a: 1]",
    "!!timestamp 2020-99-99",
    "2020-01-01",
    "0x" + "f" * 5000,
    "9" * 5000,
    "1e99999",
    ".nan",
    "-.inf",
    "1_000",
    "0o777",
    "~",
    "[" * 2000,
    "{a: " * 500,
    "? [a, b]\n: c",
    '"\\uD800"',
    '"\\x1b]0;owned\\x07"',
    "'\u202e'",
    "|\n  x",
    ">-\n",
    "%YAML 9.9",
    "---\n---\n",
    "...\n",
    "<<: *a",
    "<<: [1, 2]",
    "<<: {a: 1}",
    "- x",
    "\t",
    "@",
    "`",
    "# python -m tools.pin",
    "#   python -m tools.fetch  ",
    "#   python -m tools.pin '",
    "#   python -m tools.fetch x --name",
    "/dev/zero",
    "/proc",
    "/",
    "..",
    "../../../beside/canary.txt",
    '"\\0"',
    "${a.b}",
    "${data.train_file}",
    "{}",
    "[]",
    "yes",
    "''",
    "x" * 50_000,
)
YAML_BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{chr(98 + number)}: &{chr(98 + number)} [{','.join(['*' + chr(97 + number)] * 9)}]\n" for number in range(9)
)


def yaml_damage(text: str, rng: random.Random) -> str:
    """YAML whose lines were changed as lines."""
    lines = text.split("\n")
    for _ in range(rng.choice((1, 1, 2, 4))):
        place, action = rng.randrange(len(lines)), rng.randrange(9)
        line = lines[place]
        if action == 0:
            del lines[place]
        elif action in (1, 2, 3) and ":" in line:
            lines[place] = f"{line.partition(':')[0]}: {rng.choice(YAML_PIECES)}"
        elif action == 4:
            lines.insert(place, rng.choice(YAML_PIECES))
        elif action == 5:
            lines[place] = line[2:] if line.startswith("  ") else "  " + line
        elif action == 6:
            lines.insert(place, line)
        elif action == 7:
            lines[place] = f"{line[: len(line) - len(line.lstrip())]}{rng.choice(YAML_PIECES)}: {line.partition(':')[2]}"
        else:
            lines[place] = line.replace(rng.choice(string.ascii_lowercase), rng.choice(("", ":", "-", "\x07", "#", "&", "*", "!", "%")), 1)
        if not lines:
            lines = [""]
    if rng.random() < 0.05:
        return YAML_BOMB + "\n".join(lines)
    return "\n".join(lines)


LOCK_PATHS = (
    "/dev/zero",
    "/dev/random",
    "/dev/tty",
    "/proc/self/mem",
    "/proc/kmsg",
    "/proc",
    "/",
    "..",
    ".",
    "''",
    '"\\0"',
    "../beside/canary.txt",
    "~",
    "x" * 5000,
    "/dev/stdin",
    "/proc/self/fd",
    "/sys",
    "-rf",
    "$(touch owned)",
    '"\\x1b[2J"',
)


def project(seeds: Seeds, rng: random.Random, _number: int) -> Case:
    name = rng.choice(PROJECT_FILES)
    path = seeds.checkout / name
    data = path.read_bytes() if path.is_file() else b'{"a": {"sha256": "x", "hash": 5}}'
    readers = next(values for prefix, values in READERS.items() if name.startswith(prefix))
    module, arguments = rng.choice(readers)
    lock: list[str] = []
    content: Content
    what = "bytes"
    kind = rng.randrange(10)
    if name == "dvc.lock" and kind < 3:
        text = data.decode()
        old = rng.choice(re.findall(r"path: (\S+)", text))
        new = rng.choice(LOCK_PATHS)
        content, what = text.replace(f"path: {old}\n", f"path: {new}\n").encode(), f"path {old} is {new[:30]}"
    elif name == "params.yaml" and kind < 3:
        key = rng.choice(("train_file", "test_file", "name", "init_adapter", "template"))
        new = rng.choice((*LOCK_PATHS, "models/adapter", "data", "models/base/tiny"))
        text = re.sub(rf"(?m)^  {key}: .*$", lambda _: f"  {key}: {new}", data.decode())
        content, what = text.encode(), f"{key} is {new[:30]}"
    elif name.startswith("recipes/") and name.endswith(".yaml") and kind < 3:
        comment = rng.choice(
            (
                "#   python -m tools.pin  \n",
                "#   python -m tools.fetch  \n",
                "#   python -m tools.pin it's\n",
                "#   python -m tools.fetch a/b --name\n",
                "#   python -m tools.fetch\u2028x\n",
                "#   python -m tools.pin \x1b[2J \n",
            )
        )
        content, what = comment.encode() + data, f"comment {comment!r}"
    elif kind < 4 and name.endswith((".yaml", ".lock")):
        content, what = encoded(yaml_damage(data.decode(), rng)), "lines"
    elif kind < 7 and name.endswith(".json"):
        content, what = as_json(shaken(json.loads(data), rng)), "values"
    elif kind < 7 and name.endswith(".jsonl"):
        rows = data.decode().splitlines()
        place = rng.randrange(len(rows))
        rows[place] = json.dumps(shaken(json.loads(rows[place]), rng))
        content, what = "\n".join(rows).encode(), "values of a row"
    elif kind == 7:
        content = special(rng)
        what = f"is {content!r}"[:60]
    elif name.startswith(".dvc/config") and kind < 6:
        content = rng.choice(
            (
                b"[cache]\n    dir = /\n",
                b"[cache]\n    dir = \n",
                b"[cache\n",
                b"[cache]\ndir\n",
                b"x = 1\n",
                b"[cache]\n  dir = \x1b[2J\n",
                b"[cache]\n  dir = %(x)s\n",
                b"[cache]\n  dir = /dev/zero\n",
                b"[cache]\n dir = a\n dir = b\n",
                b"[cache]\n  dir = " + b"x" * 9000 + b"\n",
                b"[cache]\n  dir = a\0b\n",
                b"['remote \"x\"']\n  url = /\n",
            )
        )
        what = repr(content[:40])
    else:
        content = broken(data, rng)
    files: dict[str, Content] = {name: content}
    if name.startswith(("data/pre", "reports/", "metrics/")) and isinstance(content, bytes) and rng.random() < 0.7:
        lock = [name]
    if module == "tools.recipes" and "show" in arguments:
        arguments = ("show", rng.choice(("tiny-cpu", "../params", "\x1b[2J", "/etc/passwd")))
    return Case(f"{name}: {what}", module, arguments, files, lock=lock)


# The Hub.


def hub(seeds: Seeds, rng: random.Random, number: int) -> Case:
    commands: tuple[tuple[str, tuple[str, ...]], ...] = (
        ("tools.pin", ("attacked", "--repo-id", "org/name")),
        ("tools.pin", ("attacked", "--repo-id", "org/name", "--revision", "0123456789abcdef0123456789abcdef01234567")),
        ("tools.fetch", ("org/name", "--name", "attacked")),
        ("tools.fetch", ("org/name", "--name", "attacked", "--force")),
    )
    module, arguments = rng.choice(commands)
    if number % 12 == 5:
        # Slower: it computes the card in a process of its own.
        module, arguments = "tools.publish", ("--repo-id", "org/name")
    content = {"tools.pin": seeds.model, "tools.fetch": {"train.jsonl": seeds.read("data/raw/micro/train.jsonl"), "data/x.csv": b"a,b\n1,2\n"}}.get(
        module, {}
    )
    slow = number % 100 == 50
    script = random_script(
        rng, {name: data for name, data in content.items() if not name.endswith(".py")}, slow=slow, publishes=module == "tools.publish"
    )
    return Case(script.name, module, arguments, hub=script, slow=slow)


KINDS: dict[str, Attack] = {
    "template": template,
    "tokenizer": tokenizer,
    "safetensors": safetensors,
    "adapter": adapter,
    "model": model,
    "project": project,
    "hub": hub,
}
