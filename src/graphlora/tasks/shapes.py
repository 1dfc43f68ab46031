"""Turns rows of the user's data into examples: prompt and completion, chat messages, or multiple choice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from graphlora.errors import GraphLoraError
from graphlora.tasks.example import LETTERS, Example, TextExample, continuations, letters, listed
from graphlora.tasks.rows import Row
from graphlora.untrusted import parse_json

CHOICE_COLUMNS = "question, choices (or A, B, ... or choice1, choice2) and answer"
EXPECTED = f"expected prompt and completion; or messages; or {CHOICE_COLUMNS}"
ANSWER_COLUMNS = ("answer", "answerKey", "label")
ROLES = ("system", "user", "assistant", "tool", "developer")
Reader = Callable[[dict[str, Any], str], Example | TextExample]


def read_shape(rows: list[Row]) -> list[Example] | list[TextExample]:
    """Examples of rows that all have the shape of the first.

    Raises:
        GraphLoraError: No known shape, or a row that does not fit it; names the columns found, file and line.
    """
    reader = find_shape(rows[0])
    examples: list[Any] = [read_row(reader, row, str(position)) for position, row in enumerate(rows)]
    return examples


def read_row(reader: Reader, row: Row, name: str) -> Example | TextExample:
    """Example of one row, by the shape that `find_shape` recognized.

    Args:
        reader: The shape.
        row: The row.
        name: Identifier where the row has no `id`.

    Raises:
        GraphLoraError: The row does not fit; names file and line.
    """
    given = row.values.get("id")
    try:
        return reader(row.values, name if given is None else str(given))
    except KeyError as error:
        found = ", ".join(map(str, row.values))
        raise GraphLoraError(f"{row.where}: no column {error}; found {found}; {EXPECTED}") from error
    except GraphLoraError as error:
        raise GraphLoraError(f"{row.where}: {error}") from error


def find_shape(row: Row) -> Reader:
    """The shape of a data set, by the columns of its first row.

    Raises:
        GraphLoraError: No known shape; names the columns found, file and line.
    """
    columns = set(row.values)
    if {"question"} <= columns and columns & set(ANSWER_COLUMNS) and _has_choices(columns):
        return multiple_choice
    if {"prompt", "completion"} <= columns:
        return completion
    if "messages" in columns:
        return chat
    found = ", ".join(map(str, row.values)) or "none"
    raise GraphLoraError(f"{row.where}: columns found: {found}; {EXPECTED}")


def completion(row: dict[str, Any], name: str) -> TextExample:
    """Example of a row with `prompt` and `completion`."""
    prompt, text = _text(row, "prompt"), _text(row, "completion")
    if not text:
        raise GraphLoraError("completion is empty; give the text to learn")
    return TextExample(id=name, prompt=prompt, completion=text, domain=_domain(row))


def chat(row: dict[str, Any], name: str) -> TextExample:
    """Example of a row with chat `messages`: a list of {"role", "content"}."""
    messages = _list(row["messages"], "messages")
    for message in messages:
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise GraphLoraError(f"message {message!r} has no role of {', '.join(ROLES)}")
        if not isinstance(message.get("content"), str):
            raise GraphLoraError(f"message {message!r} has no text under content")
    if not any(message["role"] == "assistant" for message in messages):
        raise GraphLoraError("messages have no turn of the assistant to learn from")
    return TextExample(id=name, messages=tuple(messages), domain=_domain(row))


def multiple_choice(row: dict[str, Any], name: str) -> Example:
    """Example of a row with `question`, choices and an answer given as label, index (from 0) or text."""
    question = _text(row, "question")
    texts, labels = _choices(row)
    answer = next((row[column] for column in ANSWER_COLUMNS if column in row), None)
    return Example(
        id=name,
        prompt=f"Question: {question}\nAnswer:",
        choices=continuations(texts),
        gold=_gold(answer, texts, labels),
        letter_prompt=listed(question, texts),
        labels=letters(len(texts)),
        domain=_domain(row),
    )


def _has_choices(columns: set[str]) -> bool:
    return bool(columns & {"choices", "A", "choice1"})


def _choices(row: dict[str, Any]) -> tuple[list[str], list[str] | None]:
    """Texts of the choices, and their labels where the row gives labels."""
    if "choices" not in row:
        names = list(LETTERS) if "A" in row else [f"choice{number}" for number in range(1, len(LETTERS) + 1)]
        names = [name for name in names if row.get(name) not in (None, "")]
        return [_text(row, name) for name in names], names if "A" in row else None
    value = _parsed(row["choices"])
    labels = None
    if isinstance(value, dict):
        if not {"text", "label"} <= set(value):
            raise GraphLoraError(f"choices have the keys {', '.join(value)}; expected text and label")
        value, labels = value["text"], [str(label) for label in _list(value["label"], "choices.label")]
    texts = _list(value, "choices")
    if not all(isinstance(text, str) and text.strip() for text in texts):
        raise GraphLoraError(f"choices {texts!r} must all be texts that are not empty")
    if labels is not None and len(labels) != len(texts):
        raise GraphLoraError(f"choices have {len(texts)} texts and {len(labels)} labels")
    return texts, labels


def _gold(answer: Any, texts: list[str], labels: list[str] | None) -> int:
    """Position of the answer: an explicit label, else a choice's text, a letter, or an index from 0."""
    shown = ", ".join(labels) if labels else " | ".join(texts)
    if isinstance(answer, bool) or not isinstance(answer, (str, int)):
        raise GraphLoraError(
            f"answer {answer!r} must be a label, an index or a text among the choices {shown}"
        )
    key = str(answer).strip()
    if labels is not None and key in labels:
        return labels.index(key)
    if isinstance(answer, str):
        matches = {position for position, text in enumerate(texts) if text.strip() == key}
        if labels is None and len(key) == 1 and key in LETTERS[: len(texts)]:
            matches.add(LETTERS.index(key))
        if len(matches) > 1:
            raise GraphLoraError(f"answer {answer!r} fits several of the choices {shown}; give its index")
        if matches:
            return matches.pop()
    if key.isdecimal() and len(key) < 10 and int(key) < len(texts):
        return int(key)
    raise GraphLoraError(f"answer {answer!r} is not among the choices {shown}")


def _text(row: dict[str, Any], column: str) -> str:
    if not isinstance(row[column], str):
        raise GraphLoraError(f"{column} is {row[column]!r}; expected text")
    return row[column]


def _domain(row: dict[str, Any]) -> str | None:
    domain = row.get("domain")
    return None if domain in (None, "") else str(domain)


def _parsed(value: Any) -> Any:
    """A list or object that CSV had to write as JSON text; anything else as it is."""
    if not isinstance(value, str) or not value.lstrip().startswith(("[", "{")):
        return value
    try:
        return parse_json(value, "a column")
    except GraphLoraError as error:
        raise GraphLoraError(f"broken JSON inside a column: {value[:60]!r} ({error})") from error


def _list(value: Any, column: str) -> list[Any]:
    value = _parsed(value)
    if not isinstance(value, list) or not value:
        raise GraphLoraError(f"{column} is {value!r}; expected a list that is not empty")
    return value
