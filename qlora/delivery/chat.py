"""One answer after another in a conversation, by the tokens and settings of the evaluation, shown while it is made."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers.decoders import DecodeStream
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from qlora.core.conversation import Message
from qlora.core.errors import InputError
from qlora.model import loading
from qlora.model.chat_template import ChatTemplate
from qlora.model.config import context_length
from qlora.params.predict import PredictParams
from qlora.prediction.generation import Answer, answer_config, answer_of


@dataclass(slots=True)
class Chat:
    """A model that answers."""

    model: PreTrainedModel
    template: ChatTemplate
    params: PredictParams
    interrupted: bool = False
    """Set by a signal's handler: the answer in the making ends."""

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Token ids after which the model answers.

        Raises:
            InputError: a message looks like structure, and chat.on_control_tokens does not escape it.
        """
        return self.template.prompt(messages)

    def fit(self, messages: Sequence[Message]) -> list[Message]:
        """The conversation without its oldest questions and answers, as far as a whole answer would not fit the model's context.

        The last message stays, whether it fits or not: `answer` refuses one that leaves no room.

        Raises:
            InputError: a message looks like structure, as `prompt` has it.
        """
        fitting = list(messages)
        first = int(fitting[0]["role"] == "system")
        while len(fitting) > first + 1 and len(self.prompt(fitting)) + self.params.max_new_tokens > self._context:
            del fitting[first : first + 2]
        return fitting

    def answer(self, messages: Sequence[Message], show: Callable[[str], object] | None = None) -> Answer:
        """The model's next turn.

        Args:
            messages: They end with a user's.
            show: Called with each piece of the answer's text as it comes.

        Raises:
            InputError: the messages do not fit the model's context, or look like structure.
        """
        ids = self.prompt(messages)
        room = self._context - len(ids)
        if room < 1:
            raise InputError(
                "chat-too-long", f"{len(ids)} tokens leave no room for an answer in the model's context of {self._context}: ask for less"
            )
        stops = loading.stop_token_ids(self.model, self.template.tokenizer, self.template.stop_ids)
        config = answer_config(self.params, self.template.tokenizer, stops)
        # As for the evaluation: nothing that no param shows.
        self.model.generation_config = config
        config.max_new_tokens = min(self.params.max_new_tokens, room)
        self.interrupted = False
        # Reasoning and channels are told from the answer when it is whole.
        streams = self.template.writes_only_content
        generate: Any = self.model.generate
        prompt_BT = torch.tensor([ids], device=self.model.device)
        with torch.inference_mode():
            made = generate(
                input_ids=prompt_BT,
                attention_mask=torch.ones_like(prompt_BT),
                generation_config=config,
                streamer=_Stream(self.template.tokenizer, stops, show) if show and streams else None,
                stopping_criteria=[_Interruption(self)],
            )
        answer = answer_of(self.template.content_of, made[0, len(ids) :].tolist(), stops)
        if show and not streams:
            show(answer.text)
        return answer

    @property
    def _context(self) -> int:
        return context_length(self.model.config)


class _Interruption(StoppingCriteria):
    def __init__(self, chat: Chat) -> None:
        self._chat = chat

    def __call__(self, input_ids: Tensor, scores: object, **options: object) -> Any:  # noqa: ARG002 - as transformers calls it
        return torch.full((len(input_ids),), self._chat.interrupted, device=input_ids.device)


class _Stream(BaseStreamer):
    """Hands on the text of each token once its characters are whole, without white space around the answer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop_ids: Collection[int], show: Callable[[str], object]) -> None:
        backend: Any = tokenizer
        self._tokenizer = backend.backend_tokenizer
        self._decoder = DecodeStream([], skip_special_tokens=True)
        self._stop_ids = stop_ids
        self._show = show
        self._prompt_came = False
        self._shown = False
        self._held = ""

    def put(self, value: Tensor) -> None:
        if not self._prompt_came:
            self._prompt_came = True
            return
        for number in value.tolist():
            piece = None if number in self._stop_ids else self._decoder.step(self._tokenizer, number)
            if piece:
                self._add(piece)

    def _add(self, piece: str) -> None:
        text = self._held + piece
        if not self._shown:
            text = text.lstrip()
        whole = text.rstrip()
        self._held = text[len(whole) :]
        if whole:
            self._shown = True
            self._show(whole)

    def end(self) -> None:
        """White space that is held back stands at the end of the answer."""
