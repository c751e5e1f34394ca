"""Rendering of prompts with a recipe's chat template, as verl's data set and agent loop do it."""

from collections.abc import Iterable
from typing import Any

from omegaconf import DictConfig, OmegaConf
from verl.utils import hf_processor, hf_tokenizer

from verl_aqn.errors import ModelError, first_line
from verl_aqn.tasks.data_files import HELP

TEMPLATE_KEY = "actor_rollout_ref.model.custom_chat_template"
NO_SYSTEM = "does not accept a system turn"
NO_LIST = "where verl needs a list of messages"


class NotRendered(Exception):
    """The chat template cannot render a prompt; the message says why."""


class Template:
    """Renders prompts with the `tokenizer` and `processor` (None for a text model) that verl loads.

    Raises:
        ModelError: the tokenizer cannot be loaded.
    """

    def __init__(self, config: DictConfig) -> None:
        model = config.actor_rollout_ref.model
        self.data, self.name = config.data, str(model.path)
        folder = str(model.get("tokenizer_path") or model.path)
        try:
            self.tokenizer: Any = hf_tokenizer(folder, trust_remote_code=False)
            self.processor: Any = hf_processor(folder, trust_remote_code=False)
        except Exception as error:  # transformers may raise any error for the files of a folder
            raise ModelError(f"{folder}: its tokenizer cannot be loaded: {first_line(error)[:300]}") from error
        self.renderer = self.processor or self.tokenizer
        custom = model.get("custom_chat_template")
        if custom is not None:
            self.renderer.chat_template = custom
        elif self.processor is not None and not getattr(self.processor, "chat_template", None):
            self.processor.chat_template = self.tokenizer.chat_template

    def check(self) -> None:
        """Raise ModelError unless the tokenizer or the recipe has a chat template."""
        if not getattr(self.renderer, "chat_template", None):
            raise ModelError(
                f"{self.name}: its tokenizer has no chat template, so no prompt can be rendered: set "
                f"{TEMPLATE_KEY}, or use the instruction-tuned model"
            )

    def render(self, messages: list[dict], tools: list[dict] | None = None) -> str:
        """Return the text of a prompt as the rollout gets it.

        Raises:
            NotRendered: the template cannot render it.
        """
        try:
            return self._apply(messages, tools)
        except Exception as error:
            said = f"{type(error).__name__}: {first_line(error)[:200]}"
            rest = [one for one in messages if one.get("role") != "system"]
            if len(rest) < len(messages) and self._takes(rest, tools):
                said = f"the chat template of {self.name} {NO_SYSTEM}: {said}"
            raise NotRendered(said) from error

    def tokens(self, text: str) -> int:
        """Return the number of tokens in a rendered text-only prompt."""
        return len(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _apply(self, messages: list[dict], tools: list[dict] | None) -> str:
        options: Any = OmegaConf.to_container(self.data.get("apply_chat_template_kwargs") or OmegaConf.create({}))
        options = {key: value for key, value in options.items() if key not in ("tokenize", "return_dict")}
        if tools is not None:
            options["tools"] = tools
        options |= {"add_generation_prompt": True, "tokenize": False}
        return self.renderer.apply_chat_template(messages, **options)

    def _takes(self, messages: list[dict], tools: list[dict] | None) -> bool:
        try:
            return bool(messages) and bool(self._apply(messages, tools))
        except Exception:
            return False


def fault_of(messages: Any, key: str) -> str:
    """Say what `messages`, the prompt of a row, is instead of a list of messages; "" if it is such a list."""
    if isinstance(messages, list) and all(isinstance(one, dict) for one in messages):
        return "" if messages else f"the column {key!r} holds no messages"
    kind = "text" if isinstance(messages, str) else "null" if messages is None else type(messages).__name__
    return f"the column {key!r} holds {kind} {NO_LIST}"


def remedy(reasons: Iterable[str]) -> str:
    """Say how to fix rows that cannot be rendered for these `reasons`; without reasons, rows that are too long."""
    reasons = list(reasons)
    if any(reason.endswith(NO_LIST) for reason in reasons):
        return f'write messages such as [{{"role": "user", "content": "What is 2 + 3?"}}]; {HELP}'
    if any(NO_SYSTEM in reason for reason in reasons):
        return f"put the text of the system turn into the user's turn, or set {TEMPLATE_KEY}"
    if reasons:
        return f"correct these rows, or set {TEMPLATE_KEY}; {HELP}"
    return "raise data.max_prompt_length, or shorten the prompts"
