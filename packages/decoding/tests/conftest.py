"""Tiny random models, and drafters that know too much or too little."""

from dataclasses import dataclass

import pytest
import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

VOCAB = 12


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)


def _llama():
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.3,
            bos_token_id=None,
            eos_token_id=None,
        )
    )


def _gemma3():
    # a window shorter than the prompts, so that sliding layers are cropped beyond it
    model = Gemma3ForCausalLM(
        Gemma3TextConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            sliding_window=8,
            layer_types=["sliding_attention", "sliding_attention", "full_attention"],
            query_pre_attn_scalar=4,
            tie_word_embeddings=False,
            initializer_range=0.3,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,  # else generate takes each 0 of a prompt for padding
        )
    )
    for layer in model.model.layers:
        # at its initial scale the layers hardly move the embedding, and the model repeats one token for ever
        layer.post_attention_layernorm.weight.data += 3
        layer.post_feedforward_layernorm.weight.data += 3
    return model


def _gpt2():
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCAB,
            n_positions=256,
            n_embd=32,
            n_layer=2,
            n_head=2,
            initializer_range=0.3,
            bos_token_id=None,
            eos_token_id=None,
        )
    )


@pytest.fixture(scope="session", params=[_llama, _gemma3, _gpt2], ids=["llama", "gemma3", "gpt2"])
def random_model(request):
    """Double precision: several positions at once round like one, as far as an argmax can tell."""
    torch.manual_seed(1)
    return request.param().double().eval()


@pytest.fixture(scope="session")
def llama():
    torch.manual_seed(1)
    return _llama().double().eval()


@dataclass(frozen=True)
class ScriptDrafter:
    """Drafts from a known continuation: `text` is the whole sequence, `shift` makes every token wrong."""

    text: tuple[int, ...]
    shift: int = 0
    vocab_size: int = VOCAB

    needs_draft_model = False

    def start(self, input_ids, attention_mask, draft_model):
        return self

    def draft(self, input_ids, num_draft):
        end = input_ids.shape[1]
        return [[(t + self.shift) % self.vocab_size for t in self.text[end : end + num_draft]] for _ in input_ids]


@pytest.fixture(scope="session")
def script_drafter():
    return ScriptDrafter
