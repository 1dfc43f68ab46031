"""Every family of models that the FFN table promises: one tiny random model of each."""

from dataclasses import dataclass, field
from typing import Any

import peft
import pytest
import torch
import transformers

from graphlora import GraphLoraConfig
from graphlora.tuner.layer import GraphLoraLayer, GraphLoraLinear
from graphlora.tuner.projection import GraphLoraProjection

COMMON = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LLAMA_LIKE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
HEAD_DIM = {**LLAMA_LIKE, "head_dim": 8}
GPT_2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 48, "n_positions": 64}
FALCON = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_hidden_size": 48}
T5 = {
    "d_model": 32,
    "d_ff": 48,
    "d_kv": 8,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
    "dropout_rate": 0.0,
}


@dataclass(frozen=True)
class Family:
    """A tiny model of one family.

    Attributes:
        model: name of its class in transformers.
        sizes: arguments of the configuration.
        blocks: adapted FFN blocks.
        attention: adapted attention projections.
        changes: further arguments of the configuration.
    """

    model: str
    sizes: dict[str, Any]
    blocks: int = 2
    attention: int = 8
    changes: dict[str, Any] = field(default_factory=dict)

    def build(self) -> torch.nn.Module:
        torch.manual_seed(0)
        sizes = {**COMMON, **self.sizes, **self.changes}
        cls = getattr(transformers, self.model)
        model = cls(cls.config_class(**sizes, use_cache=False))
        # Residual branches of GPT-2 and T5 start so small that nothing downstream would notice an adapter.
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.1)
        return model.eval()


FAMILIES = {
    "llama": Family("LlamaForCausalLM", LLAMA_LIKE),
    "llama_bias": Family("LlamaForCausalLM", LLAMA_LIKE, changes={"mlp_bias": True, "attention_bias": True}),
    "qwen2": Family("Qwen2ForCausalLM", LLAMA_LIKE),
    "qwen3": Family("Qwen3ForCausalLM", HEAD_DIM),
    "mistral": Family("MistralForCausalLM", LLAMA_LIKE),
    "gemma2": Family("Gemma2ForCausalLM", HEAD_DIM, changes={"sliding_window": 4}),
    "gemma3_text": Family("Gemma3ForCausalLM", HEAD_DIM, changes={"sliding_window": 4}),
    "olmo2": Family("Olmo2ForCausalLM", LLAMA_LIKE),
    "granite": Family("GraniteForCausalLM", LLAMA_LIKE),
    "smollm3": Family("SmolLM3ForCausalLM", LLAMA_LIKE),
    "stablelm": Family("StableLmForCausalLM", LLAMA_LIKE),
    "phi3": Family("Phi3ForCausalLM", LLAMA_LIKE, attention=4, changes={"sliding_window": None}),
    "glm4": Family("Glm4ForCausalLM", HEAD_DIM),
    "phi2": Family("PhiForCausalLM", LLAMA_LIKE),
    "gpt_neox": Family("GPTNeoXForCausalLM", LLAMA_LIKE, attention=4),
    "gpt2": Family("GPT2LMHeadModel", GPT_2, attention=4),
    "opt": Family(
        "OPTForCausalLM",
        {**LLAMA_LIKE, "ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0, "attention_dropout": 0.0},
    ),
    "starcoder2": Family("Starcoder2ForCausalLM", LLAMA_LIKE),
    "falcon_7b": Family(
        "FalconForCausalLM", FALCON, attention=4, changes={"multi_query": True, "parallel_attn": True}
    ),
    "falcon_40b": Family(
        "FalconForCausalLM",
        {**FALCON, "num_kv_heads": 2},
        attention=4,
        changes={"new_decoder_architecture": True},
    ),
    "falcon_rw": Family(
        "FalconForCausalLM",
        FALCON,
        attention=4,
        changes={"alibi": True, "bias": True, "parallel_attn": False, "multi_query": False},
    ),
    "t5": Family("T5ForConditionalGeneration", {**T5, "feed_forward_proj": "relu"}, 4, 24),
    "t5_gated": Family("T5ForConditionalGeneration", {**T5, "feed_forward_proj": "gated-gelu"}, 4, 24),
}


def _config(family: Family, **changes: Any) -> GraphLoraConfig:
    task = "SEQ_2_SEQ_LM" if family.model.startswith("T5") else "CAUSAL_LM"
    # A few steps on a few tokens are to lower the loss of the text, not to balance experts.
    small = {"num_experts": 4, "top_k": 2, "r": 2, "lora_alpha": 4, "router_hidden_size": 8}
    return GraphLoraConfig(task_type=task, **{**small, "router_normal_loss_coef": 1.0, **changes})


def _batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    mask[0, -3:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


@torch.no_grad()
def _logits(model: torch.nn.Module) -> torch.Tensor:
    return model(**_batch()).logits[_batch()["attention_mask"] != 0]


def _snapshot(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.fixture(params=FAMILIES, ids=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]


def _train(model: torch.nn.Module, steps: int = 8) -> tuple[list[float], list[str]]:
    """Losses of a few steps, and the trainable parameters that never had a gradient."""
    model.train()
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trainable.values(), lr=2e-2)
    losses, idle = [], set(trainable)
    for _ in range(steps):
        outputs = model(**_batch())
        outputs.loss.backward()
        losses.append(float(outputs.loss.detach() - outputs.aux_loss.detach()))
        idle -= {name for name, p in trainable.items() if p.grad is not None and p.grad.abs().sum() > 0}
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    return losses, sorted(idle)


def test_family_starts_as_base_trains_saves_loads_and_unloads(family, tmp_path):
    base = family.build()
    base_logits, base_state, base_config = _logits(base), _snapshot(base), base.config.to_dict()

    model = peft.get_peft_model(base, _config(family)).eval()
    assert sum(isinstance(m, GraphLoraLayer) for m in model.modules()) == family.blocks
    assert sum(isinstance(m, GraphLoraLinear) for m in model.modules()) == family.attention
    torch.testing.assert_close(
        _logits(model), base_logits, rtol=1e-6, atol=1e-6 * float(base_logits.abs().max())
    )

    losses, idle = _train(model)
    assert losses[-1] < 0.97 * losses[0]
    assert idle == []
    trained_logits = _logits(model)
    assert (trained_logits - base_logits).abs().max() > 1e-2

    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(family.build(), tmp_path, adapter_name="other").eval()
    assert torch.equal(_logits(loaded), trained_logits)

    restored = model.unload()
    assert torch.equal(_logits(restored), base_logits)
    assert list(restored.state_dict()) == list(base_state)
    assert all(torch.equal(restored.state_dict()[name], tensor) for name, tensor in base_state.items())
    assert restored.config.to_dict() == base_config


@pytest.mark.parametrize("name", ["gpt2", "starcoder2", "t5", "t5_gated"])
def test_the_base_models_own_ffn_dropout_stays(name):
    model = peft.get_peft_model(FAMILIES[name].build(), _config(FAMILIES[name]))
    layer = next(m for m in model.modules() if isinstance(m, GraphLoraLayer))
    pattern = layer.parts.pattern
    dropout = pattern.hidden_dropout or pattern.output_dropout
    if isinstance(getattr(layer.base_layer, dropout), torch.nn.Module):
        getattr(layer.base_layer, dropout).p = 1.0
    else:
        setattr(layer.base_layer, dropout, 1.0)
    x = torch.randn(3, 32)
    assert torch.equal(layer.train()(x), torch.zeros(3, 32))
    assert not torch.equal(layer.eval()(x), torch.zeros(3, 32))


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2", "opt", "t5"])
def test_linear_granularity_starts_as_base_in_every_layout(name):
    family = FAMILIES[name]
    base = family.build()
    base_logits = _logits(base)
    model = peft.get_peft_model(base, _config(family, expert_granularity="linear")).eval()
    tolerance = 1e-6 * float(base_logits.abs().max())
    torch.testing.assert_close(_logits(model), base_logits, rtol=1e-6, atol=tolerance)
    assert _train(model)[1] == []


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt_neox", "gpt2", "opt", "falcon_7b", "t5", "t5_gated"])
def test_a_router_per_projection_in_every_layout(name, tmp_path):
    family = FAMILIES[name]
    base = family.build()
    base_logits, base_state = _logits(base), list(base.state_dict())
    options = {"preset": "mola", "num_experts_by_layer": [2, 3], "lora_dropout": 0.0, "num_experts": None}
    model = peft.get_peft_model(base, _config(family, **options)).eval()
    adapted = [m for m in model.modules() if isinstance(m, GraphLoraProjection)]
    per_block = len(adapted) - family.attention
    assert per_block in (2 * family.blocks, 3 * family.blocks)
    assert {m.router("default").num_experts for m in adapted} == {2, 3}
    assert torch.equal(_logits(model), base_logits)
    losses, idle = _train(model)
    assert losses[-1] < 0.97 * losses[0]
    assert idle == []
    trained = _logits(model)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(family.build(), tmp_path, adapter_name="other").eval()
    torch.testing.assert_close(_logits(loaded), trained, rtol=1e-5, atol=1e-5)
    restored = model.unload()
    assert torch.equal(_logits(restored), base_logits)
    assert list(restored.state_dict()) == base_state


def test_cross_attention_counts_the_encoders_tokens():
    family = FAMILIES["t5"]
    model = peft.get_peft_model(family.build(), _config(family, preset="mola", num_experts=2))
    sides = {m.block_name: m.side for m in model.modules() if isinstance(m, GraphLoraProjection)}
    cross = "decoder.block.0.layer.1.EncDecAttention."
    assert [sides[cross + name] for name in "qkvo"] == ["decoder", "encoder", "encoder", "decoder"]
    batch = {**_batch(), "labels": _batch()["labels"][:, :5].contiguous()}
    with model.base_model.record_routing() as record:
        model(**batch)
    tokens = {name: len(routing.router_logits) for name, routing in record.items()}
    assert {name: 18 if side == "encoder" else 10 for name, side in sides.items()} == tokens
