"""The table of docs/models.md: what becomes of each family's chat template, found by trying it.

    python docs/models.py

Every stock template of the installed TRL for text chat, and the plain forms in tests/families.py, with a tokenizer that has the family's tokens.
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from qlora.core.conversation import Conversation, Message  # noqa: E402 - from the root
from qlora.core.errors import InputError  # noqa: E402
from qlora.model.chat_template import SWITCHES, ChatTemplate  # noqa: E402
from qlora.model.structure import TOOL  # noqa: E402
from tests.families import TURNS, settings_of, stand_in, stock, talk  # noqa: E402
from tests.helpers import chat_params  # noqa: E402

PAGE = ROOT / "docs/models.md"
BEGIN, END = "<!-- made by `python docs/models.py` -->", "<!-- end -->"
REAL = {
    **dict.fromkeys(("qwen2_5", "qwen3", "qwen3_instruct_2507", "qwen3_5_nothink", "chatml"), "Qwen3"),
    **dict.fromkeys(("llama3", "llama3_1", "llama3_2"), "Llama 3"),
    **dict.fromkeys(("deepseekv3", "deepseek_r1_distill"), "DeepSeek V3"),
}
"""Real tokenizers, with which tests/real tries these."""


def rows() -> Iterator[tuple[str, ...]]:
    for name, source in stock().items():
        fixed = settings_of(source)
        plain, needed = _first(name, source, fixed)
        template = plain or ChatTemplate(stand_in(name, source), chat_params(template_kwargs=fixed))
        # A bar would end the table's cell.
        ends = ", ".join(f"`{template.tokenizer.decode([number])}`" for number in template.stop_ids).replace("|", r"\|")
        how = _how(template, talk(*TURNS)) if plain else "refused"
        yield (
            f"`{name}`",
            REAL.get(name, "stand-in"),
            how,
            ends,
            _how(ChatTemplate(stand_in(name, source), chat_params(template_kwargs={**fixed, **_thinking(name)})), talk(*TURNS, reasoning="So.")),
            _tools(template),
            ", ".join(f"`{key}: {_yaml(value)}`" for key, value in {**fixed, **needed}.items()) or "nothing",
        )


def _yaml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _first(name: str, source: str, fixed: Any) -> tuple[ChatTemplate | None, dict[str, Any]]:
    """The template with as few variables set as plain answers need."""
    for needed in ({}, *SWITCHES):
        template = ChatTemplate(stand_in(name, source), chat_params(template_kwargs={**fixed, **needed}))
        if _how(template, talk(*TURNS)) != "refused":
            return template, dict(needed)
    return None, {}


def _thinking(name: str) -> dict[str, bool]:
    return {"enable_thinking": True} if name.endswith("nothink") else {}


def _how(template: ChatTemplate, conversation: Conversation) -> str:
    try:
        return "whole" if len(template.encode(conversation).rows) == 1 else "one by one"
    except InputError:
        return "refused"


def _tools(template: ChatTemplate) -> str:
    call: Any = {"type": "function", "function": {"name": "lookup", "arguments": {"key": "abc"}}}
    called = Message(role="assistant", content="", tool_calls=[call])
    messages = [Message(role="user", content="What is it?"), called, Message(role="tool", content="the result", name="lookup")]
    return "refused" if _how(template, Conversation("", "", [*messages, Message(role="assistant", content="So.")], [TOOL])) == "refused" else "shown"


def page(text: str) -> str:
    """The page with its table made anew."""
    header = ("template", "tokenizer tried", "plain answers", "ends a turn", "with reasoning", "tools", "`chat.template_kwargs`")
    lines = [" | ".join(row) for row in (header, ("---",) * len(header), *rows())]
    table = "\n".join(f"| {line} |" for line in lines)
    return re.sub(f"({re.escape(BEGIN)}\n).*?({re.escape(END)})", lambda found: f"{found[1]}{table}\n{found[2]}", text, flags=re.DOTALL)


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
