"""How the zoo's language models are trained, and what the shipped ones can do."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tersor.integration import evaluation, zoo
from tersor.integration.zoo.measure import language as measure
from tersor.integration.zoo.recall import Prompt
from tersor.integration.zoo.training import language as training
from tersor.integration.zoo.training.corpus import SOURCES
from tersor.integration.zoo.training.text import Text, encode

NAMES = [name for name in training.TRAININGS if name in zoo.names()]


@pytest.fixture(scope="module")
def text(tiny_lm_tokenizer):
    """A small corpus: each source repeats one paragraph of the held-out text."""
    paragraphs = [p for p in zoo.held_out_text().split("\n\n") if len(p) > 300]
    documents = [{"source": s.package, "text": paragraphs[i] * 9} for i, s in enumerate(SOURCES)]
    return Text(documents, tiny_lm_tokenizer)


def tiny(name):
    """A training like `name`'s with small matrices and six steps."""
    whole = training.TRAININGS[name]
    config = type(whole.config)(**whole.config.to_dict() | {"hidden_size": 64, "intermediate_size": 32})
    stage = dataclasses.replace(whole.stages[-1], steps=6, text_tokens=256)
    return dataclasses.replace(whole, config=config, stages=(stage,), teacher=None)


def run(settings, folder, text, tokenizer):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(settings.config, dtype=torch.float32)
    return training.start(settings, settings.stages[0], folder, model, text, tokenizer, seed=0)


@pytest.mark.parametrize("name", training.TRAININGS)
def test_stopped_training_ends_with_the_same_weights(name, text, tiny_lm_tokenizer, tmp_path):
    settings = tiny(name)
    whole = run(settings, tmp_path / "whole", text, tiny_lm_tokenizer)
    losses = [whole.advance() for _ in range(6)]
    stopped = run(settings, tmp_path / "stopped", text, tiny_lm_tokenizer)
    found = [stopped.advance() for _ in range(3)]
    stopped.save()
    stopped.advance()  # lost
    resumed = run(settings, tmp_path / "stopped", text, tiny_lm_tokenizer)
    assert found + [resumed.advance() for _ in range(3)] == losses
    for key, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[key]), key


def test_a_student_that_is_its_teacher_has_no_loss(tiny_lm, text):
    tokens = text.windows(2, 32, np.random.default_rng(0))
    with torch.no_grad():
        assert abs(training.text_loss(tiny_lm, tokens, teacher=tiny_lm).item()) < 1e-5
        assert training.text_loss(tiny_lm, tokens).item() > 1


def test_a_student_begins_with_its_teachers_embeddings(tiny_lm):
    fresh = training._fresh(training.TINY_DRAFT, seed=0)
    assert torch.equal(fresh.get_input_embeddings().weight, tiny_lm.get_input_embeddings().weight)
    assert fresh.lm_head.weight is fresh.get_input_embeddings().weight


def test_answers_alone_are_learnt(tiny_lm):
    """Their mean log probability, whatever the lengths of the prompts beside them."""
    prompts = [Prompt([0, 300, 400, 500], [2], 1.0), Prompt([0, 700, 600, 650, 620, 610], [3, 5], 1.0)]
    with torch.no_grad():
        logs = [tiny_lm(torch.tensor([p.ids])).logits[0].log_softmax(-1) for p in prompts]
        expected = -(logs[0][1, 400] + logs[1][2, 650] + logs[1][4, 610]) / 3
        torch.testing.assert_close(training.answer_loss(tiny_lm, prompts), expected)


def test_a_mixture_of_experts_is_also_charged_for_its_balance():
    """The balancing loss is smallest, top_k, where the router is uniform (arXiv:2101.03961, equation 4)."""
    settings = tiny("tiny-moe")
    model = AutoModelForCausalLM.from_config(settings.config, dtype=torch.float32).eval()
    tokens = torch.arange(65)[None]
    with torch.no_grad():
        output = model(tokens[:, :-1], labels=tokens[:, :-1], output_router_logits=True)
        plain = torch.nn.functional.cross_entropy(output.logits[0], tokens[0, 1:])
        charged = training.text_loss(model, tokens) - plain
    assert output.aux_loss.item() >= settings.config.num_experts_per_tok * 0.99
    assert charged.item() == pytest.approx(settings.config.router_aux_loss_coef * output.aux_loss.item(), rel=1e-3)


def test_stage_lengths_only_grow():
    for settings in training.TRAININGS.values():
        for stage in settings.stages:
            lengths = [stage.length(done / 100) for done in range(100)]
            assert lengths == sorted(lengths)
            assert lengths[-1] <= settings.config.max_position_embeddings


def test_windows_come_from_each_source_by_its_weight(text):
    random = np.random.default_rng(0)
    starts = [stream[: len(stream) // 9] for stream in text.streams]
    vocabularies = [set(stream.tolist()) for stream in starts]
    rows = text.windows(400, 40, random)
    assert rows.shape == (400, 41)
    shares = np.zeros(len(SOURCES))
    for row in rows:
        fits = [set(row.tolist()) <= vocabulary for vocabulary in vocabularies]
        shares += np.array(fits) / sum(fits)
    np.testing.assert_allclose(shares / 400, text.weights, atol=0.08)


def test_documents_begin_with_bos(tiny_lm_tokenizer):
    ids = encode(["one", "two"], tiny_lm_tokenizer)
    assert tiny_lm_tokenizer.decode(ids) == "<|endoftext|>one<|endoftext|>two"


def test_bigrams_know_more_than_a_uniform_guess(tiny_lm_tokenizer):
    rows = evaluation.windows(tiny_lm_tokenizer, zoo.held_out_text(), 1024, 256)
    assert 100 < measure.bigram_perplexity(rows, measure._calibration(tiny_lm_tokenizer), 4096) < 4096 / 4


def test_agreement_with_oneself_is_whole(tiny_lm, tiny_lm_tokenizer):
    rows = evaluation.windows(tiny_lm_tokenizer, zoo.held_out_text(), 512, 128)
    assert measure.agreement(tiny_lm, tiny_lm, rows) == 1.0
    assert 0 < measure.bigram_agreement(tiny_lm, measure._calibration(tiny_lm_tokenizer), rows) < 0.5


def test_recall_of_a_model_that_looks_up_is_whole(tiny_lm_tokenizer):
    class LooksUp:
        """Predicts what followed the last earlier occurrence of the token."""

        device = torch.device("cpu")

        def __call__(self, ids):
            logits = torch.zeros(*ids.shape, 4096)
            seen = {}
            for place, token in enumerate(ids[0].tolist()):
                logits[0, place, seen.get(token, 0)] = 1
                if place + 1 < ids.shape[1]:
                    seen[token] = int(ids[0, place + 1])
            return type("Output", (), {"logits": logits})

    accuracy, chance = measure.recall(LooksUp(), tiny_lm_tokenizer, "records", 256, prompts=10)
    assert accuracy == 1.0
    assert 0 < chance < 0.02


@pytest.mark.parametrize("name", NAMES)
def test_shipped_weights_are_small_and_the_config_is_the_one_that_is_trained(name):
    model = AutoModelForCausalLM.from_pretrained(zoo.path(name))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert sum(file.stat().st_size for file in zoo.path(name).iterdir()) <= 20e6
    for key in ("hidden_size", "num_hidden_layers", "num_key_value_heads", "intermediate_size", "vocab_size"):
        assert getattr(model.config, key) == getattr(training.TRAININGS[name].config, key)


@pytest.mark.parametrize("name", NAMES)
def test_held_out_text_is_read_better_than_by_bigrams(name):
    model, tokenizer = zoo.load(name)
    rows = evaluation.windows(tokenizer, zoo.held_out_text(), 2048, 256)
    perplexity = evaluation.read(model, rows).perplexity
    assert perplexity < measure.bigram_perplexity(rows, measure._calibration(tokenizer), 4096) / 2
    assert math.isfinite(perplexity)
