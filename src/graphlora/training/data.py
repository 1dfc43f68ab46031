"""From examples to batches: token ids and labels, refused or cut where too long, padded or packed."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn
from torch.nn.functional import pad
from transformers import DataCollatorForSeq2Seq, DataCollatorWithFlattening, PreTrainedTokenizerBase

from graphlora.errors import GraphLoraError
from graphlora.evaluation.encoding import encode_pair
from graphlora.tasks.example import Example, TextExample

IGNORED = -100
Row = dict[str, list[int]]


@dataclass(frozen=True)
class Encoding:
    """How examples become token rows; the recipe's options of the same names.

    Attributes:
        scoring: Multiple choice is learned as the choice's text (`"cloze"`) or its letter (`"letter"`).
        train_on: Labels on the answer only, or on the whole sequence.
        append_eos: End each answer with the end-of-text token.
        max_length: Longest sequence in tokens.
        truncation: What happens to a longer one.
    """

    scoring: Literal["cloze", "letter"] = "cloze"
    train_on: Literal["completion", "all"] = "completion"
    append_eos: bool = True
    max_length: int | None = None
    truncation: Literal["refuse", "prompt", "end", "drop"] = "refuse"


@dataclass
class Encoded:
    """Token rows of one split.

    Attributes:
        rows: Per row `input_ids` and `labels` (-100 where there is no loss), both [tokens].
        num_cut: Rows that were cut.
        num_dropped: Rows that were left out.
        longest: Longest sequence before cutting, in tokens.
        names: Per row, the name of its example.
    """

    rows: list[Row]
    num_cut: int = 0
    num_dropped: int = 0
    longest: int = 0
    names: list[str] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        """Tokens of all rows."""
        return sum(len(row["input_ids"]) for row in self.rows)


def encode(
    example: Example | TextExample,
    tokenizer: PreTrainedTokenizerBase,
    *,
    scoring: Literal["cloze", "letter"] = "cloze",
    train_on: Literal["completion", "all"] = "completion",
    append_eos: bool = True,
) -> Row:
    """Token row of one example: `input_ids` and `labels`, both [tokens].

    Prompt and answer are tokenized as they are when a model is scored. Of a chat, the assistant's turns are
    the answer, with what the template puts at their ends.

    Raises:
        GraphLoraError: An empty answer; a chat without a chat template, or whose template cannot tell the
            answers apart.
    """
    if isinstance(example, TextExample) and example.messages is not None:
        return _chat_row(example, tokenizer, train_on)
    context, answer = encode_pair(tokenizer, *_prompt_and_answer(example, scoring))
    if not answer:
        raise GraphLoraError(f"row {example.id!r} has an empty answer; give it text to learn")
    if append_eos and tokenizer.eos_token_id is not None:
        answer = [*answer, tokenizer.eos_token_id]
    ids = [*context, *answer]
    return {"input_ids": ids, "labels": list(ids) if train_on == "all" else [IGNORED] * len(context) + answer}


def encode_all(
    examples: Iterable[Example | TextExample], tokenizer: PreTrainedTokenizerBase, how: Encoding
) -> Encoded:
    """Token rows of a split.

    Raises:
        GraphLoraError: A row is longer than `max_length` and `truncation` refuses it, an answer alone is too
            long, or no row is left.
    """
    encoded = Encoded([])
    refused: list[str] = []
    for example in examples:
        row = encode(
            example, tokenizer, scoring=how.scoring, train_on=how.train_on, append_eos=how.append_eos
        )
        length = len(row["input_ids"])
        encoded.longest = max(encoded.longest, length)
        if how.max_length is None or length <= how.max_length:
            encoded.rows.append(row)
            encoded.names.append(example.id)
        elif how.truncation == "refuse":
            refused.append(f"row {example.id!r} has {length} tokens")
        elif how.truncation == "drop":
            encoded.num_dropped += 1
        else:
            encoded.rows.append(_cut(row, example.id, how.max_length, how.truncation))
            encoded.names.append(example.id)
            encoded.num_cut += 1
    if refused:
        others = f" and {len(refused) - 1} other row(s) too" if len(refused) > 1 else ""
        raise GraphLoraError(
            f"{refused[0]}, more than max_length {how.max_length}{others} (longest: {encoded.longest}); "
            "raise max_length, or set truncation to prompt (keeps the answer), end or drop"
        )
    if not encoded.rows:
        raise GraphLoraError(
            f"no row is left: all {encoded.num_dropped} are longer than {how.max_length} tokens"
        )
    return encoded


def prompt_template(examples: Sequence[Example | TextExample], scoring: str) -> str:
    r"""What all prompts share, around `{prompt}`: `"Question: {prompt}\nAnswer:"`.

    A shared beginning counts up to its last colon or line end, a shared end from its first line end on, so that
    words which the prompts happen to have in common stay out. Chats give `"{prompt}"`.
    """
    prompts = [
        _prompt_and_answer(item, scoring)[0]
        for item in examples
        if not (isinstance(item, TextExample) and item.messages is not None)
    ]
    if len(prompts) < 2 or len(prompts) < len(examples):
        return "{prompt}"
    start = _shared_start(prompts)
    start = start[: max(start.rfind(": ") + 2 if ": " in start else 0, start.rfind("\n") + 1)]
    end = _shared_start([prompt[len(start) :][::-1] for prompt in prompts])[::-1]
    end = end[end.find("\n") :] if "\n" in end else ""
    return f"{start}{{prompt}}{end}"


def padding_collator(tokenizer: PreTrainedTokenizerBase) -> DataCollatorForSeq2Seq:
    """Collator that pads a batch on the right: ids [rows, tokens], labels padded with -100."""
    return DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED, padding=True)


def packing_collator() -> DataCollatorWithFlattening:
    """Collator that joins a batch into one row [1, tokens]; `position_ids` start anew with each sequence.

    Attention stays within each sequence because transformers reads the sequence borders from `position_ids`.
    """
    return DataCollatorWithFlattening()


def takes_answer_logits(model: nn.Module) -> bool:
    """Whether a model's forward can compute logits at chosen positions and take labels that are already shifted."""
    parameters = inspect.signature(type(model).forward).parameters
    kwargs = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    return "logits_to_keep" in parameters and kwargs


class AnswerLogits:
    """A collator around another one that asks for logits only where some row has a label to predict.

    The output layer is a fifth of a small model's work, and its float32 logits are most of the memory of a large
    vocabulary; with the loss on short answers, most positions need neither.
    """

    def __init__(self, collate: Callable[[Any], Any], round_up: Callable[[int], int] | None = None) -> None:
        """Wrap a collator.

        Args:
            collate: The other collator.
            round_up: Number of positions to give for a number of them, so that few numbers occur; the added ones
                have no label. Left out: as many as there are.
        """
        self.collate, self.round_up = collate, round_up

    def __call__(self, rows: list[Row]) -> dict[str, Any]:
        """The other collator's batch, with `logits_to_keep` [positions] and `shift_labels` [rows, positions]."""
        batch = dict(self.collate(rows))
        shifted = batch["labels"][:, 1:]
        positions = (shifted != IGNORED).any(dim=0).nonzero().flatten()
        more = 0 if self.round_up is None else self.round_up(len(positions)) - len(positions)
        if len(positions) > 0 and len(positions) + more < 0.75 * shifted.shape[1]:
            labels = pad(shifted[:, positions], (0, more), value=IGNORED)
            batch |= {"logits_to_keep": pad(positions, (0, more)), "shift_labels": labels}
        return batch


def _shared_start(texts: Sequence[str]) -> str:
    first, last = min(texts), max(texts)
    length = next((at for at, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    return first[:length]


def _prompt_and_answer(example: Example | TextExample, scoring: str) -> tuple[str, str]:
    if isinstance(example, TextExample):
        return example.prompt or "", example.completion or ""
    if scoring == "letter":
        return example.letter_prompt, example.labels[example.gold]
    return example.context(example.gold), example.choices[example.gold]


def _chat_row(example: TextExample, tokenizer: PreTrainedTokenizerBase, train_on: str) -> Row:
    if not tokenizer.is_fast:
        raise GraphLoraError(
            f"the tokenizer {type(tokenizer).__name__} does not tell which characters a token stands for; "
            "use a model with a fast tokenizer (tokenizer.json)"
        )
    text, spans = _chat(example, tokenizer, train_on)
    tokens = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids = list(tokens["input_ids"])
    labels = [
        token if any(end > first and start < last for first, last in spans) else IGNORED
        for token, (start, end) in zip(ids, tokens["offset_mapping"], strict=True)
    ]
    return {"input_ids": ids, "labels": labels}


def _chat(
    example: TextExample, tokenizer: PreTrainedTokenizerBase, train_on: str
) -> tuple[str, list[tuple[int, int]]]:
    """Text of a chat and the character spans to learn: the assistant's turns, or everything."""
    messages = list(example.messages or ())
    render: Any = tokenizer.apply_chat_template
    if tokenizer.chat_template is None:
        raise GraphLoraError(
            f"row {example.id!r} is a chat and the model has no chat template; use prompt and completion"
        )
    text = render(messages, tokenize=False)
    if train_on == "all":
        return text, [(0, len(text))]
    spans = []
    for turn, message in enumerate(messages):
        if message.get("role") != "assistant":
            continue
        before = render(messages[:turn], tokenize=False, add_generation_prompt=True)
        after = render(messages[: turn + 1], tokenize=False)
        if not (after.startswith(before) and text.startswith(after)):
            raise GraphLoraError(
                f"row {example.id!r}: the chat template rewrites earlier turns, so answers cannot be told "
                "apart; set train_on to all, or give one answer per row"
            )
        spans.append((len(before), len(after)))
    if not spans:
        raise GraphLoraError(f"row {example.id!r} has no assistant message to learn")
    return text, spans


def _cut(row: Row, name: str, max_length: int, truncation: str) -> Row:
    if truncation == "end":
        return {key: values[:max_length] for key, values in row.items()}
    answer = sum(label != IGNORED for label in row["labels"])
    if answer >= max_length:
        raise GraphLoraError(
            f"row {name!r} has an answer of {answer} tokens, which does not fit in max_length {max_length}; "
            "set truncation to end or drop"
        )
    return {key: values[-max_length:] for key, values in row.items()}
