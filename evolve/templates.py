"""Text to tokens, in one place: messages -> ids, and where the answer in them starts.

Training, generation, reward models and judges all come through here, so that a prompt is the same tokens everywhere:
the tokenizer's chat template decides the layout, there is exactly one BOS, and nothing is ever cut.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from evolve.config import Template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = list[dict[str, str]]


class Encoded(NamedTuple):
    """Token ids of a prompt and its answer; `ids[answer:]` are the answer's, with the token that ends it."""

    ids: list[int]
    answer: int

    @property
    def answer_tokens(self) -> int:
        return len(self.ids) - self.answer


def load_tokenizer(path: Path | str, chat_template: str | None, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """A model's tokenizer with a chat template and a pad token.

    Raises ValueError if it has no chat template and none is given.
    """
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    if not tokenizer.chat_template:
        raise ValueError(f"{path}: its tokenizer has no chat template; set model.chat_template=FILE.jinja")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def direct(prompt: str) -> Messages:
    """x: the prompt as the user's turn."""
    return [{"role": "user", "content": prompt}]


def refine(template: Template, prompt: str, answers: Sequence[str]) -> Messages:
    """(x, y, z): one user turn that shows the prompt and earlier answers, and asks for a better one."""
    return direct(fill(template.text, prompt=prompt, response=template.separator.join(answers)))


def fill(text: str, **fields: str) -> str:
    """The text with its {fields} filled in, in one pass: an answer which itself says "{response}" is left as it is."""
    names = "|".join(fields)
    return re.sub(rf"\{{({names})\}}", lambda match: fields[match[1]], text).strip()


def asking(template: Template | None, prompt: str, answers: Sequence[str]) -> Messages:
    """What a strategy asks: for an answer to the prompt or, with earlier answers, for a better one."""
    if not answers:
        return direct(prompt)
    assert template is not None, "a strategy that refines needs a template"
    return refine(template, prompt, answers)


def encode_prompt(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> list[int]:
    """Ids up to where the answer starts."""
    ids: Any = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    _check_bos(tokenizer, ids)
    return ids


def encode(tokenizer: PreTrainedTokenizerBase, messages: Messages, answer: str, finished: bool = True) -> Encoded:
    """Ids of a prompt and its answer; the end token is part of the answer if the answer was finished.

    The answer's text is tokenised by itself, as a model that generates it starts from the prompt's last token: so the
    prompt's ids are `encode_prompt`'s whatever the answer starts with.

    Raises ValueError if the chat template lays a prompt out differently once an answer follows, or ends an answer with
    something other than the end token that generation stops at.
    """
    prompt = encode_prompt(tokenizer, messages)
    before = _render(tokenizer, messages, add_generation_prompt=True)
    whole = _render(tokenizer, [*messages, {"role": "assistant", "content": answer}], add_generation_prompt=False)
    if not whole.startswith(before):
        raise ValueError(
            "the chat template changes the prompt's text when an answer follows, so what is trained would not be what "
            "is generated; set model.chat_template to one that doesn't"
        )
    answer_ids: Any = tokenizer(whole[len(before) :], add_special_tokens=False)["input_ids"]
    end = tokenizer.eos_token_id
    if end not in answer_ids:
        raise ValueError(
            f"the chat template doesn't end an answer with the end token {tokenizer.eos_token!r}, so a model trained "
            "on it would never stop; set model.chat_template to one that does"
        )
    cut = (
        len(answer_ids) - 1 - answer_ids[::-1].index(end)
    )  # many templates write a newline behind it; a model never does
    return Encoded(prompt + answer_ids[: cut + 1 if finished else cut], len(prompt))


def conversation(tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str) -> list[int]:
    """What a reward model reads: both turns as its chat template lays them out, with all that it writes behind them."""
    messages = [*direct(prompt), {"role": "assistant", "content": answer}]
    ids: Any = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    if tokenizer.bos_token_id != tokenizer.eos_token_id or ids[:1] == [tokenizer.bos_token_id]:
        _check_bos(tokenizer, ids)
    return ids


def padding(sequences: Iterable[Sequence[int]], *preferred: int | None) -> int:
    """An id that none of the sequences ends with.

    transformers' classifiers read a sequence at its last token that is not `config.pad_token_id`: so at its very last
    if they are padded with this one, and the config says so.
    """
    ends = {ids[-1] for ids in sequences}
    return next(token for token in (*preferred, *range(len(ends) + 1)) if token is not None and token not in ends)


def _render(tokenizer: PreTrainedTokenizerBase, messages: Messages, add_generation_prompt: bool) -> str:
    return str(tokenizer.apply_chat_template(messages, add_generation_prompt=add_generation_prompt, tokenize=False))


def _check_bos(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> None:
    bos = tokenizer.bos_token_id
    if bos is None or bos not in ids:
        return  # Qwen's have none, by design
    if ids[0] != bos or ids[1:2] == [bos]:
        raise ValueError(
            f"{tokenizer.name_or_path}: the chat template gives {ids[:3]}..., where one BOS ({bos}) belongs"
        )
