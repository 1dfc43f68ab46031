"""Finding FFN blocks: what is found, and what is refused with which words."""

import peft
import pytest
import torch
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from graphlora.errors import GraphLoraError
from graphlora.tuner import ffn
from graphlora.tuner.layer import GraphLoraLayer

NAMES = {"gate_proj": "inner_gate", "up_proj": "inner", "down_proj": "outer", "act_fn": "squash"}


class OddBlock(nn.Module):
    """A gated block with names of its own."""

    def __init__(self, act: nn.Module | None = None) -> None:
        super().__init__()
        self.inner_gate, self.inner = nn.Linear(16, 24), nn.Linear(16, 24)
        self.outer, self.squash = nn.Linear(24, 16), act or nn.Tanh()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.outer(self.squash(self.inner_gate(x)) * self.inner(x))


class Impostor(nn.Module):
    """Llama's names, another function."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(16, 24), nn.Linear(16, 24), nn.Linear(24, 16)
        self.act_fn = nn.SiLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * torch.sigmoid(self.up_proj(x)))


class TwoInputs(Impostor):
    """A block that needs more than the hidden states."""

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + residual


class TinyConfig(PretrainedConfig):
    model_type = "tiny_for_graphlora"


class TinyModel(PreTrainedModel):
    """Embedding, one block, head."""

    config_class = TinyConfig

    def __init__(self, block: nn.Module) -> None:
        super().__init__(TinyConfig())
        self.embed, self.block, self.head = nn.Embedding(32, 16), block, nn.Linear(16, 32)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def forward(self, input_ids: torch.Tensor) -> CausalLMOutput:
        return CausalLMOutput(logits=self.head(self.block(self.embed(input_ids))))


def test_no_block_found_lists_what_was_looked_for_and_what_is_there(make_config):
    with pytest.raises(GraphLoraError) as caught:
        peft.get_peft_model(TinyModel(OddBlock()), make_config(task_type=None))
    message = str(caught.value)
    for part in (
        "TinyModel",
        "head, inner, inner_gate, outer",
        "gate_proj + up_proj + down_proj",
        "GPT-2",
        "ffn_modules=",
    ):
        assert part in message
    assert "\n" not in message


def test_ffn_modules_is_the_remedy(make_config, fill_adapter):
    ids = torch.arange(12).view(2, 6)
    torch.manual_seed(0)
    model = TinyModel(OddBlock())
    before = model(ids).logits
    adapted = peft.get_peft_model(model, make_config(task_type=None, ffn_modules=NAMES))
    layer = model.block
    assert isinstance(layer, GraphLoraLayer)
    assert layer.parts.gated
    torch.testing.assert_close(adapted(ids).logits, before, rtol=1e-6, atol=1e-6)
    fill_adapter(adapted)
    assert not torch.allclose(adapted(ids).logits, before, atol=1e-3)


def test_ffn_modules_works_beside_named_targets(make_config):
    config = make_config(
        task_type=None, ffn_modules=NAMES, target_modules=["block"], attention_target_modules=[]
    )
    assert isinstance(
        peft.get_peft_model(TinyModel(OddBlock()), config).base_model.model.block, GraphLoraLayer
    )


@pytest.mark.parametrize(
    "names",
    [{"up_proj": "inner"}, {"down_proj": "outer"}, {**NAMES, "middle": "x"}],
    ids=["no_down", "no_up", "unknown"],
)
def test_incomplete_ffn_modules_is_refused(names, make_config):
    with pytest.raises(GraphLoraError, match=r"ffn_modules=.* must name down_proj and up_proj"):
        make_config(task_type=None, ffn_modules=names, target_modules=["block"])


def test_ffn_modules_that_leaves_the_activation_out(make_config):
    names = {key: value for key, value in NAMES.items() if key != "act_fn"}
    config = make_config(task_type=None, ffn_modules=names)
    with pytest.raises(GraphLoraError, match=r"no activation named act_fn.*'act_fn': 'NAME'"):
        peft.get_peft_model(TinyModel(OddBlock()), config)


def test_an_impostor_is_refused(make_config):
    with pytest.raises(GraphLoraError, match=r"block \(Impostor\).*computes something else"):
        peft.get_peft_model(TinyModel(Impostor()), make_config(task_type=None))


def test_a_block_with_more_inputs_is_refused(make_config):
    with pytest.raises(GraphLoraError, match=r"block \(TwoInputs\) takes more than the hidden states"):
        peft.get_peft_model(TinyModel(TwoInputs()), make_config(task_type=None))


def test_a_wrong_target_names_the_blocks_there_are(make_llama, make_config):
    with pytest.raises(GraphLoraError) as caught:
        peft.get_peft_model(make_llama(), make_config(target_modules=["ffn"]))
    assert "'ffn'" in str(caught.value)
    assert "model.layers.0.mlp, model.layers.1.mlp" in str(caught.value)


def test_a_target_that_is_no_block_is_refused(make_llama, make_config):
    with pytest.raises(
        GraphLoraError, match=r"model.layers.0 \(LlamaDecoderLayer\) is not a known FFN block"
    ):
        peft.get_peft_model(make_llama(), make_config(target_modules=["layers.0"]))


def test_a_mixture_of_experts_is_refused(make_config):
    config = MixtralConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=2,
    )
    with pytest.raises(
        GraphLoraError, match=r"MixtralForCausalLM is already a mixture of experts .*dense base"
    ):
        peft.get_peft_model(MixtralForCausalLM(config), make_config())


def test_an_activation_is_recognized_by_what_it_computes():
    from transformers.activations import ACT2FN

    from graphlora.ops.expert_ffn.activations import _known_name

    known = {"silu", "swish", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "gelu_fast"}
    for name in known:
        assert _known_name(ACT2FN[name]) is not None, name
    for name in ("quick_gelu", "relu2", "tanh", "mish"):
        assert _known_name(ACT2FN[name]) is None, name


def test_every_row_of_the_table_names_its_families():
    assert all(pattern.families and pattern.projections() for pattern in ffn.PATTERNS)
