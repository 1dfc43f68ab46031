"""`graphlora generate`: one prompt, a file of prompts, or a chat in the terminal."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentParser, Namespace

from graphlora.cli.parsing import add_model_options, make_parser
from graphlora.errors import GraphLoraError

DESCRIPTION = """\
Let a model answer: one --prompt, a --file of prompts (one per line, or JSONL with a column prompt), or,
without either, a chat in the terminal. Answers stream as they are written. The model's chat template is
used where it has one, unless the adapter was trained on plain text; --template gives a prompt its form."""
EXAMPLE = """
graphlora generate runs/quiz --template 'Question: {prompt}\\nAnswer:' --prompt 'Why is the sky blue?'
graphlora generate runs/chat
graphlora generate runs/quiz --file questions.txt --output answers.jsonl --max_new_tokens 20
graphlora generate runs/quiz --file questions.txt --output answers.jsonl --compile
"""
CHAT_HELP = "type a message; /reset forgets the conversation, /exit or Ctrl-D ends"


def build_parser() -> ArgumentParser:
    """Parser of the command."""
    parser = make_parser(
        "graphlora generate MODEL [--prompt TEXT | --file FILE] [options]", DESCRIPTION, EXAMPLE
    )
    parser.add_argument("model", type=str, help="an adapter's directory, or a base model")
    prompts = parser.add_argument_group("Prompts")
    prompts.add_argument("--prompt", type=str | None, default=None, help="one prompt")
    prompts.add_argument("--file", type=str | None, default=None, help="prompts: one per line, or JSONL")
    prompts.add_argument(
        "--template",
        type=str | None,
        default=None,
        help="text around each prompt; \\n is a new line; left out: as in training",
    )
    prompts.add_argument("--system", type=str | None, default=None, help="system message of a chat")
    prompts.add_argument(
        "--chat_template",
        type=Literal["auto", "on", "off"],
        default="auto",
        help="use the model's chat template",
    )
    answers = parser.add_argument_group("Answers")
    answers.add_argument("--max_new_tokens", type=int, default=256, help="longest answer in tokens")
    answers.add_argument(
        "--temperature", type=float, default=0.0, help="0: the likeliest words; higher: more varied"
    )
    answers.add_argument(
        "--top_p", type=float, default=1.0, help="draw from the likeliest words of this mass"
    )
    answers.add_argument("--seed", type=int, default=0, help="seed of the draws")
    answers.add_argument("--batch_size", type=int, default=8, help="prompts of a file at a time")
    answers.add_argument(
        "--output", type=str | None, default=None, help="JSONL file for the answers to a file"
    )
    answers.add_argument(
        "--compile",
        action="store_true",
        help="compile the model and record its steps as CUDA graphs: slow to start, then faster; CUDA devices only",
    )
    add_model_options(parser.add_argument_group("Model"))
    return parser


def run(arguments: Namespace) -> None:
    """Answer."""
    _check(arguments)
    prompts = _read_prompts(Path(arguments.file)) if arguments.file is not None else None
    from graphlora.training.loading import load_for_use

    model, tokenizer, adapter = load_for_use(
        arguments.model, arguments.base_model, arguments.dtype, arguments.device
    )
    trained = _training_form(arguments.model) if adapter is not None else {}
    chat = _uses_chat(arguments.chat_template, tokenizer, trained)
    speaker = Speaker(model, tokenizer, chat, arguments)
    template = _template(arguments.template, chat, trained)
    if prompts is not None:
        _answer_file(speaker, prompts, template, arguments)
    elif arguments.prompt is not None:
        speaker.stream(speaker.text([_user(arguments.prompt, template)]))
    else:
        _chat(speaker, template)


class Speaker:
    """A model that answers texts, with the settings of the command line."""

    def __init__(self, model: Any, tokenizer: Any, chat: bool, arguments: Namespace) -> None:
        """Keep the model and how to draw words from it."""
        from transformers import GenerationConfig, set_seed

        from graphlora.evaluation.generation import StaticGenerator

        set_seed(arguments.seed)
        self.model, self.tokenizer, self.chat = model, tokenizer, chat
        self.batch_size: int = arguments.batch_size
        self.compiles: bool = arguments.compile and _may_compile(model)
        # transformers compiles the steps behind a cache of fixed size, and leaves them uncompiled without one.
        self.generate = StaticGenerator(model) if self.compiles else model.generate
        self.system = arguments.system
        self.window: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        draws = (
            {"temperature": arguments.temperature, "top_p": arguments.top_p} if arguments.temperature else {}
        )
        defaults = model.generation_config
        self.settings = GenerationConfig(
            max_new_tokens=arguments.max_new_tokens,
            do_sample=bool(draws),
            eos_token_id=defaults.eos_token_id
            if defaults.eos_token_id is not None
            else tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=defaults.bos_token_id,
            **draws,
        )

    def text(self, messages: list[dict[str, str]]) -> str:
        """What the model reads: the chat template's text, or the messages alone."""
        if not self.chat:
            return "\n".join(message["content"] for message in messages)
        system = [{"role": "system", "content": self.system}] if self.system else []
        return self.tokenizer.apply_chat_template(
            system + messages, tokenize=False, add_generation_prompt=True
        )

    def stream(self, text: str) -> str:
        """Write the answer as it comes; returns it."""
        from transformers import TextStreamer

        inputs = self._encoded([text])
        streamer = TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        output = self._generate(inputs, streamer=streamer)
        return self._answers(output, inputs)[0]

    def answers(self, texts: list[str]) -> list[str]:
        """Answers to a batch."""
        # A compiled model has one batch size.
        missing = max(self.batch_size - len(texts), 0) if self.compiles else 0
        inputs = self._encoded([*texts, *texts[-1:] * missing])
        return self._answers(self._generate(inputs), inputs)[: len(texts)]

    def _generate(self, inputs: Any, **kwargs: Any) -> Any:
        return self.generate(**inputs, generation_config=self.settings, **kwargs)

    def _encoded(self, texts: list[str]) -> Any:
        inputs = self.tokenizer(
            texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=not self.chat
        )
        length = inputs["input_ids"].shape[1]
        if length == 0:
            raise GraphLoraError("the prompt is empty; give it text")
        if self.window is not None and length + self.settings.max_new_tokens > self.window:
            raise GraphLoraError(
                f"a prompt of {length} tokens and max_new_tokens {self.settings.max_new_tokens} do not fit "
                f"the model's window of {self.window} tokens; shorten the prompt or lower max_new_tokens"
            )
        return {name: inputs[name].to(self.model.device) for name in ("input_ids", "attention_mask")}

    def _answers(self, output: Any, inputs: Any) -> list[str]:
        new = output[:, inputs["input_ids"].shape[1] :]
        return [text.strip() for text in self.tokenizer.batch_decode(new, skip_special_tokens=True)]


def _may_compile(model: Any) -> bool:
    """Whether `--compile` does anything on the model's device; says so where it does not.

    Raises:
        GraphLoraError: for an architecture that cannot be compiled.
    """
    if model.device.type != "cuda":
        sys.stderr.write(f"--compile is for CUDA devices; ignored on {model.device.type}\n")
        return False
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not getattr(base, "_can_compile_fullgraph", False):
        raise GraphLoraError(f"{type(base).__name__} cannot be compiled to generate; leave --compile out")
    return True


def _check(arguments: Namespace) -> None:
    if arguments.prompt is not None and arguments.file is not None:
        raise GraphLoraError("--prompt and --file are both given; choose one")
    if arguments.output is not None and arguments.file is None:
        raise GraphLoraError("--output needs --file")
    if arguments.template is not None and "{prompt}" not in arguments.template:
        raise GraphLoraError(
            f"--template is {arguments.template!r}; it needs {{prompt}} where the prompt goes"
        )
    if arguments.temperature < 0 or not 0 < arguments.top_p <= 1:
        raise GraphLoraError(
            f"--temperature is {arguments.temperature} and --top_p {arguments.top_p}; give 0 or more, and a "
            "mass above 0 and up to 1"
        )
    for name in ("max_new_tokens", "batch_size"):
        if arguments[name] < 1:
            raise GraphLoraError(f"--{name} is {arguments[name]}; give at least 1")


def _read_prompts(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise GraphLoraError(
            f"cannot read the prompts in {path}: {getattr(error, 'strerror', error)}"
        ) from error
    prompts = []
    for number, line in enumerate(lines, start=1):
        if path.suffix != ".jsonl":
            prompts += [line] if line.strip() else []
        elif line.strip():
            prompts.append(_prompt_of(line, f"{path}:{number}"))
    if not prompts:
        raise GraphLoraError(f"{path} has no prompts")
    return prompts


def _prompt_of(line: str, where: str) -> str:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise GraphLoraError(f"{where}: broken JSON ({error.msg} at column {error.colno})") from error
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
        found = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        raise GraphLoraError(f"{where}: no text in a column prompt; found {found}")
    return row["prompt"]


def _uses_chat(choice: str, tokenizer: Any, trained: dict[str, Any]) -> bool:
    """Whether prompts go through the chat template: by choice, else as the adapter was trained."""
    has_template = tokenizer.chat_template is not None
    if choice != "auto":
        if choice == "on" and not has_template:
            raise GraphLoraError("the model has no chat template; leave --chat_template out")
        return choice == "on"
    return has_template and trained.get("prompt_format") != "plain"


def _training_form(path: str) -> dict[str, Any]:
    """What the record beside the adapter says about the form of its training text."""
    from graphlora.records import RunRecord
    from graphlora.training.checkpoints import RECORD_FILE

    record = Path(path) / RECORD_FILE
    return RunRecord.read(record).metrics if record.is_file() else {}


def _template(given: str | None, chat: bool, trained: dict[str, Any]) -> str:
    """Text around each prompt: as given, else as in training, which is told."""
    if given is not None:
        return given.replace("\\n", "\n")
    template = "{prompt}" if chat else str(trained.get("prompt_template", "{prompt}"))
    if template != "{prompt}":
        sys.stderr.write(f"prompts get the form of training: {template!r} (--template changes it)\n")
    return template


def _user(prompt: str, template: str) -> dict[str, str]:
    return {"role": "user", "content": template.replace("{prompt}", prompt)}


def _answer_file(speaker: Speaker, prompts: list[str], template: str, arguments: Namespace) -> None:
    from tqdm import tqdm

    from graphlora.records import write_text

    texts = [speaker.text([_user(prompt, template)]) for prompt in prompts]
    lines = []
    for start in tqdm(range(0, len(texts), arguments.batch_size), desc="answering", unit="batch"):
        batch = slice(start, start + arguments.batch_size)
        for prompt, answer in zip(prompts[batch], speaker.answers(texts[batch]), strict=True):
            lines.append(json.dumps({"prompt": prompt, "answer": answer}, ensure_ascii=False))
    text = "".join(f"{line}\n" for line in lines)
    if arguments.output is None:
        sys.stdout.write(text)
    else:
        print(f"answers: {write_text(arguments.output, text)}")


def _chat(speaker: Speaker, template: str) -> None:
    asks = sys.stdin.isatty()
    if asks:
        print(CHAT_HELP)
    messages: list[dict[str, str]] = []
    while True:
        try:
            words = input("> " if asks else "").strip()
        except EOFError:
            break
        if words == "/exit":
            break
        if words == "/reset":
            messages = []
        elif words:
            messages = [*messages, _user(words, template)] if speaker.chat else [_user(words, template)]
            answer = speaker.stream(speaker.text(messages))
            messages.append({"role": "assistant", "content": answer})
