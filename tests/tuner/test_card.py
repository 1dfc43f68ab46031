"""The model card beside an adapter: says what it is, and keeps what its user wrote."""

from pathlib import Path
from types import SimpleNamespace

import transformers.utils.hub as hub
from huggingface_hub import ModelCard
from huggingface_hub.errors import EntryNotFoundError

from graphlora import GraphLoraConfig
from graphlora.tuner.card import model_card_section

USERS_TEXT = "# My quiz adapter\n\nTrained on questions about lighthouses.\n"


def test_saving_writes_a_card_that_says_what_the_adapter_is(make_adapted, tmp_path):
    make_adapted(num_experts=5, top_k=3).save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "peft"
    assert {"graphlora", "lora", "mixture-of-experts"} <= set(card.data.tags)
    for part in (
        "# GraphLoRA adapter",
        "5 LoRA experts of rank\n2",
        "picks 3 of them",
        "2412.16216",
        "cannot be merged",
    ):
        assert part in card.text
    assert "[More Information Needed]" not in card.text


def test_the_card_of_another_method_is_its_own(make_adapted, tmp_path):
    expected = {
        "mola": "has 2, 4, 6, 8 (low to high) LoRA experts of rank\n2; a router, a linear layer, picks 2 of them",
        "hydralora": "Each adapted projection has 3 LoRA experts of rank\n2; a router, a linear layer, weighs all",
        "dynmole": "picks as many as have mass 0.75",
    }
    for preset, part in expected.items():
        counts = {"num_experts": None if preset == "mola" else 3}
        make_adapted(preset=preset, **counts).save_pretrained(tmp_path / preset)
        text = (tmp_path / preset / "README.md").read_text()
        assert part in text
        assert f"# Mixture of LoRA experts, preset {preset}" in text
        assert "# GraphLoRA adapter" not in text


def test_saving_twice_writes_one_section(make_adapted, tmp_path):
    model = make_adapted()
    model.save_pretrained(tmp_path)
    once = (tmp_path / "README.md").read_text()
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == once
    assert once.count("# GraphLoRA adapter") == 1


def test_a_users_text_survives(make_adapted, tmp_path):
    path = tmp_path / "README.md"
    path.write_text("---\nlicense: mit\n---\n" + USERS_TEXT, encoding="utf-8")
    model = make_adapted()
    for _ in range(2):
        model.save_pretrained(tmp_path)
        card = ModelCard.load(path)
        assert USERS_TEXT.strip() in card.text
        assert card.text.index("lighthouses") < card.text.index("# GraphLoRA adapter")
        assert card.data.license == "mit"
        assert "graphlora" in card.data.tags


def test_text_after_the_section_survives_and_the_section_is_renewed(make_adapted, tmp_path):
    path = tmp_path / "README.md"
    make_adapted().save_pretrained(tmp_path)
    path.write_text(path.read_text() + "\n## Results\n\n81 of 100.\n")
    make_adapted(num_experts=7).save_pretrained(tmp_path)
    text = path.read_text()
    assert "81 of 100." in text
    assert "7 LoRA experts" in text
    assert "4 LoRA experts" not in text


def test_the_card_describes_the_adapter_beside_it(make_adapted, make_config, tmp_path):
    model = make_adapted()
    model.add_adapter("wide", make_config(num_experts=6))
    model.save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "4 LoRA experts" in text
    assert "6 LoRA experts" not in text


def test_a_config_saved_alone_writes_no_card(tmp_path):
    GraphLoraConfig().save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter_config.json"]


def test_the_section_follows_the_configuration():
    linear = model_card_section(GraphLoraConfig(router_type="linear", attention_target_modules=[]))
    assert "a router, a linear layer, picks 2" in linear
    assert "attention projections with plain LoRA | none" in linear
    given = model_card_section(GraphLoraConfig(edges=[[0, 1]], target_modules=r".*\.mlp"))
    assert "1 given edges" in given
    assert r".*\.mlp" in given


def test_push_to_hub_uploads_the_card_and_the_adapter(make_adapted, tmp_path, monkeypatch):
    """Everything but the network is real: the hub's client is replaced by one that keeps what it is given."""
    uploaded = {}

    class Hub:
        def create_repo(self, repo_id, **kwargs):
            return SimpleNamespace(repo_id=repo_id)

        def create_commit(self, repo_id, operations, **kwargs):
            uploaded.update({op.path_in_repo: Path(op.path_or_fileobj).read_bytes() for op in operations})
            return SimpleNamespace(commit_url="")

    def load(card, *args, **kwargs):
        if card == "somebody/quiz":
            raise EntryNotFoundError("no card yet")
        return from_file(card, *args, **kwargs)

    from_file = ModelCard.load
    if hasattr(hub, "hf_api"):
        monkeypatch.setattr(hub, "hf_api", Hub)
    else:  # an older transformers calls functions of a client that it made on import
        monkeypatch.setattr(hub, "create_repo", Hub().create_repo)
        monkeypatch.setattr(hub, "create_commit", Hub().create_commit)
    monkeypatch.setattr(ModelCard, "load", load)
    make_adapted().push_to_hub("somebody/quiz")
    assert {"adapter_model.safetensors", "adapter_config.json", "README.md"} <= set(uploaded)
    card = uploaded["README.md"].decode()
    assert "# GraphLoRA adapter" in card
    assert "library_name: peft" in card
    assert "More Information Needed" not in card
