# SPDX-License-Identifier: Apache-2.0
"""Gemma 4's turns for Tunix's agentic learners, which render message by message."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tunix.rl.agentic.parser.chat_template_parser.parser import BaseChatTemplateParser, TokenConfig

from ...data.processor import Processor

_HEADERS = {"system": "system\n", "user": "user\n", "tool": "user\n"}


class ChatParser(BaseChatTemplateParser):
    """`chat_parser` of an agentic learner.

    Args:
        processor: its chat template gives the tokens around a turn and the model's header. Text
            alone: the host's agents have no images.
    """

    def __init__(self, processor: Processor):
        self._chat = processor.chat
        super().__init__(processor.tokenizer)

    def _init_tokens(self) -> TokenConfig:
        chat = self._chat
        begin = {role: chat.turn_start + header for role, header in _HEADERS.items()}
        return TokenConfig(
            bos_token=self.tokenizer.bos_token,
            eot_token=chat.turn_end,
            system_token=begin["system"],
            user_token=begin["user"],
            assistant_token=chat.turn_start + chat.header,
            message_separator="\n",
        )

    def _init_generation_prompt(self) -> str:
        prefix = "".join(piece.text for piece in self._chat.prefix)
        return self.tokens.assistant_token + prefix

    def parse(
        self,
        messages: Sequence[Mapping[str, str]],
        add_generation_prompt: bool = False,
        is_first_msg: bool = False,
    ) -> str:
        """The text of `messages`, and of what precedes an answer.

        Args:
            messages: `role` and `content`.
            add_generation_prompt: end where the model is to speak.
            is_first_msg: begin a conversation; otherwise go on behind a turn's last token.
        """
        turns = [self._parse_message(message) for message in messages]
        if add_generation_prompt:
            turns.append(self.generation_prompt)
        separator = self.tokens.message_separator
        begin = self.tokens.bos_token if is_first_msg else separator
        return begin + separator.join(turns) if turns else ""
