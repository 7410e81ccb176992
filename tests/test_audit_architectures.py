"""The audit on architectures of transformers, tiny and random: no download. Five faults planted in
GPT-2 are found with every seed; no honest model is accused."""

import pytest
import torch
from torch import nn

from musota.lab.audit import audit

pytestmark = pytest.mark.slow
V, T, D = 64, 24, 32
SIZE = {"vocab_size": V, "hidden_size": D, "num_hidden_layers": 2}
IDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
HEADS = {"num_attention_heads": 4, "intermediate_size": 48, "max_position_embeddings": T}
LLAMA = SIZE | IDS | HEADS | {"num_key_value_heads": 2}
EXPERTS = {"num_local_experts": 4}
WINDOW = {"sliding_window": 6, "head_dim": 8}
GRIFFIN = {"num_hidden_layers": 3, "lru_width": D, "attention_window_size": 8, "head_dim": 8}
REFORMER = {"vocab_size": V, "hidden_size": D, "is_decoder": True, "num_attention_heads": 2}
REFORMER |= {"attn_layers": ["local"] * 2, "local_attn_chunk_length": 4, "axial_pos_shape": (4, 6)}
REFORMER |= {"max_position_embeddings": T, "axial_pos_embds_dim": (8, 24)}
UNDROPPED = {"hidden_dropout_prob": 0.0, "local_attention_probs_dropout_prob": 0.0}
CAUSAL = {
    "GPT2LMHeadModel": {"vocab_size": V, "n_embd": D, "n_layer": 2, "n_head": 4, "n_positions": T},
    "LlamaForCausalLM": LLAMA,
    "GPTNeoXForCausalLM": SIZE | HEADS | IDS,
    "BloomForCausalLM": SIZE | IDS | {"n_head": 4},
    "Qwen3ForCausalLM": LLAMA | {"head_dim": 8},
    "MistralForCausalLM": LLAMA | WINDOW,
    "Gemma2ForCausalLM": LLAMA | WINDOW,
    "MixtralForCausalLM": LLAMA | EXPERTS,
    "GptOssForCausalLM": LLAMA | WINDOW | EXPERTS,
    "MambaForCausalLM": SIZE | IDS | {"state_size": 4},
    "RwkvForCausalLM": SIZE | IDS | {"context_length": T},
    "RecurrentGemmaForCausalLM": LLAMA | GRIFFIN,
    "BertLMHeadModel": SIZE | HEADS | {"is_decoder": True},
    "ReformerModelWithLMHead": REFORMER | UNDROPPED,  # takes one length only
}
NOT_CAUSAL = {
    "BertForMaskedLM": SIZE | HEADS,
    "RobertaForMaskedLM": SIZE | HEADS | {"max_position_embeddings": T + 2},
    "XLNetLMHeadModel": {"vocab_size": V, "d_model": D, "n_layer": 2, "n_head": 4, "d_inner": 48},
    "FNetForMaskedLM": SIZE | HEADS,
    "ModernBertForMaskedLM": SIZE | IDS | HEADS | {"cls_token_id": 1, "sep_token_id": 2},
}


@pytest.fixture(scope="module")
def transformers():
    library = pytest.importorskip("transformers")
    library.logging.set_verbosity_error()
    return library


def built(transformers, name: str, settings: dict, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    kind = getattr(transformers, name)
    return kind(kind.config_class(**settings))


@pytest.mark.parametrize("name", CAUSAL)
def test_causal_architectures_are_honest(name, transformers):
    found = audit(built(transformers, name, CAUSAL[name]), V, T)
    assert found.honest, str(found)
    decisions = [finding.decision for finding in found.findings]
    assert decisions == ["no", "no", "no", "not given", "no", "measured"]


@pytest.mark.parametrize("name", NOT_CAUSAL)
def test_architectures_that_read_both_sides_look_ahead(name, transformers):
    found = audit(built(transformers, name, NOT_CAUSAL[name]), V, T)
    assert found.status == 1 and found.findings[0].decision == "looks ahead"
    assert found.findings[1].decision == "no"  # and nothing else is claimed


def test_dropout_that_is_seeded_anew_in_every_call_is_left_out(transformers):
    found = audit(built(transformers, "ReformerModelWithLMHead", REFORMER), V, T)
    assert found.honest, str(found)


def attends(model, ahead: int, only_in_training: bool = False) -> None:
    """Lets the last layer attend to `ahead` later tokens."""

    def widen(attention, arguments, named):
        length = arguments[0].shape[1]
        if attention.training or not only_in_training:
            mask = torch.ones(length, length, dtype=torch.bool).tril(ahead)
            named["attention_mask"] = mask[None, None]
        return arguments, named

    model.transformer.h[-1].attn.register_forward_pre_hook(widen, with_kwargs=True)


def adds(model, what) -> None:
    """Adds a thousandth of `what(block, x)` to the output x of the first layer."""
    model.transformer.h[0].register_forward_hook(lambda block, _, x: x + 1e-3 * what(block, x))


def later_mean(block, x):
    later = torch.ones(x.shape[1], x.shape[1]).triu(1)
    return later / later.sum(1, keepdim=True).clamp(min=1) @ x


def shifted_twice(model, ids):
    return model(ids[:, :-1], labels=ids[:, 1:]).loss  # the model shifts its labels itself


PLANTED = {  # the change, the loss, and the decision that names it
    "mask off in one layer": (lambda model: attends(model, T), None, "looks ahead"),
    "mask one too wide": (lambda model: attends(model, 1), None, "looks ahead"),
    "leak in training only": (lambda model: attends(model, T, True), None, "looks ahead"),
    "labels shifted twice": (lambda model: None, shifted_twice, "shifted twice"),
    "future mean at a thousandth": (lambda model: adds(model, later_mean), None, "looks ahead"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_planted_faults_are_found_with_ten_seeds(name, transformers):
    change, loss, decision = PLANTED[name]
    for seed in range(10):
        model = built(transformers, "GPT2LMHeadModel", CAUSAL["GPT2LMHeadModel"], seed)
        change(model)
        found = audit(model, V, T, loss)
        faults = [one.decision for one in found.findings if one.next_step]
        assert not found.honest and faults[:1] == [decision], (seed, str(found))


def test_a_leak_of_many_tokens_together_is_found(transformers):
    """A single token moves the mean of 256 by less than rounding is allowed to."""
    sizes = CAUSAL["GPT2LMHeadModel"] | {"n_positions": 256}
    for seed in range(3):
        model = built(transformers, "GPT2LMHeadModel", sizes, seed)
        adds(model, lambda block, x: block.training * x.mean(1, keepdim=True))
        found = audit(model, V, 256)
        assert found.findings[0].decision == "looks ahead"
        assert "all the tokens after it are" in found.findings[0].reason


def test_none_of_twenty_honest_models_is_accused(transformers):
    for seed in range(20):
        sizes = CAUSAL["GPT2LMHeadModel"] | {"n_head": 2 + 2 * (seed % 2), "n_layer": 1 + seed % 3}
        sizes |= {"attn_implementation": ("sdpa", "eager")[seed % 2]}
        loss = (lambda model, ids: model(ids, labels=ids).loss) if seed % 4 == 0 else None
        found = audit(built(transformers, "GPT2LMHeadModel", sizes, seed), V, T, loss)
        assert found.honest, (seed, str(found))
        assert found.findings[3].decision == ("yes" if loss else "not given")
