"""A tiny random Llama with a tokenizer, and small data files, built on the spot."""

import json
import random
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
COLORS = ("red", "blue", "green", "black", "white", "brown")
THINGS = ("sky", "grass", "coal", "snow", "earth", "rose", "sea", "leaf", "night", "cloud")


def make_tokenizer() -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    words = " ".join((*COLORS, *THINGS, "Question: What color is the? Answer:"))
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        show_progress=False,
        special_tokens=["<|end|>", "<|pad|>", "<|user|>", "<|assistant|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    inner.train_from_iterator([words] * 20, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<|end|>", pad_token="<|pad|>", chat_template=CHAT_TEMPLATE
    )


def make_model(folder: Path, hidden_size: int = 32, layers: int = 2, window: int = 128) -> Path:
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=window,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def choice_rows(count: int, seed: int = 0) -> list[dict]:
    draw = random.Random(seed)
    rows = []
    for number in range(count):
        thing = THINGS[number % len(THINGS)]
        gold = COLORS[THINGS.index(thing) % len(COLORS)]
        choices = [gold, *draw.sample([color for color in COLORS if color != gold], draw.choice((1, 2, 3)))]
        draw.shuffle(choices)
        rows.append({"question": f"What color is the {thing} {number}?", "choices": choices, "answer": gold})
    return rows


def pytest_collection_modifyitems(items):
    """PEFT asks transformers for a property that transformers has renamed; nobody here can mend it."""
    mark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(mark)


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def other_model(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "wider", hidden_size=48)


@pytest.fixture(scope="session")
def choices_file(tmp_path_factory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "colors.jsonl", choice_rows(40))


@pytest.fixture(scope="session")
def texts_file(tmp_path_factory) -> Path:
    rows = [
        {"prompt": f"What color is the {thing} {number}?", "completion": f" {COLORS[number % 6]}"}
        for number, thing in enumerate(THINGS * 4)
    ]
    return write_rows(tmp_path_factory.mktemp("data") / "texts.jsonl", rows)


GRAPHLORA = {"num_experts": 4, "top_k": 2, "router_hidden_size": 16}


@pytest.fixture
def tiny_recipe(tiny_model, choices_file, tmp_path) -> dict:
    """Options of a run of seconds, in float32 with dropout, so that the random state matters."""
    return {
        "model": str(tiny_model),
        "task": str(choices_file),
        "output_dir": str(tmp_path / "out"),
        "method": "lora",
        "dtype": "float32",
        "r": 4,
        "lora_alpha": 8,
        "lora_dropout": 0.1,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 4,
        "max_steps": 6,
        "eval_steps": 3,
        "logging_steps": 1,
        "training_args": {"use_cpu": True, "disable_tqdm": True},
    }


@pytest.fixture(params=["lora", "graphlora"])
def any_recipe(request, tiny_recipe) -> dict:
    """The same run with plain LoRA and with GraphLoRA."""
    return tiny_recipe | {"method": request.param} | (GRAPHLORA if request.param == "graphlora" else {})
