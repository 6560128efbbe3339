"""The shipped model has learnt to write, and is what was shipped."""

import collections
import math
import re
import shutil

import pytest
import torch

from tersor.integration import evaluation, models, zoo
from tersor.integration.zoo.measure.language import bigram_perplexity
from tersor.integration.zoo.training import corpus
from tersor.integration.zoo.training.muon import orthogonalise


@pytest.fixture(scope="module")
def tiny():
    directory = zoo.path("tiny-lm")
    return models.load(directory), models.load_tokenizer(directory)


def test_model_is_small_and_stored_in_bf16(tiny):
    directory, parameters = zoo.path("tiny-lm"), sum(p.numel() for p in tiny[0].parameters())
    assert 5e6 <= parameters <= 10e6
    assert models.tensor_nbytes(directory) == 2 * parameters
    assert models.checkpoint_dtype(directory) is torch.bfloat16
    assert sum(path.stat().st_size for path in directory.iterdir()) <= 20e6


def test_perplexity_is_far_below_what_token_counts_alone_give(tiny, held_out_text):
    """Counting tokens is three times worse even when fitted to the very text it is scored on; counting pairs of
    tokens in the rest of the same text is twice worse."""
    model, tokenizer = tiny
    rows = evaluation.windows(tokenizer, held_out_text, 8192, 512)
    perplexity = evaluation.read(model, rows).perplexity
    tokens = rows[:, 1:].flatten().tolist()
    counts = collections.Counter(tokens)
    unigram = math.exp(-sum(n * math.log(n / len(tokens)) for n in counts.values()) / len(tokens))
    assert perplexity < unigram / 3
    rest = tokenizer(held_out_text, add_special_tokens=False).input_ids[8192:]
    assert perplexity < bigram_perplexity(rows, rest, model.config.vocab_size) / 2


def test_it_writes_words(tiny, held_out_text):
    """Nine of ten words that it writes occur in English prose; random weights write none."""
    model, tokenizer = tiny
    known = set(re.findall(r"[a-z]+", held_out_text.lower()))
    prompt = tokenizer("It was a very", return_tensors="pt").input_ids

    def share_known(model) -> float:
        torch.manual_seed(0)  # transformers samples from the global generator
        output = model.generate(prompt, max_new_tokens=120, do_sample=True, temperature=0.7, num_return_sequences=4)
        words = re.findall(r"[a-z]+", " ".join(tokenizer.batch_decode(output[:, prompt.shape[1] :])).lower())
        return sum(word in known for word in words) / len(words)

    assert share_known(model) > 0.9
    assert share_known(type(model)(model.config)) < 0.6


def test_tokenizer_round_trips_any_text(tiny):
    text = "def f(x):\n\treturn {'ä': 1234, \"€\": x[-1]}  # naïve — 漢字\n"
    ids = tiny[1](text).input_ids
    assert tiny[1].decode(ids) == text
    assert max(ids) < tiny[0].config.vocab_size


def test_damaged_weights_are_named(tmp_path):
    folder = tmp_path / "tiny_lm"
    shutil.copytree(zoo.path("tiny-lm"), folder)
    zoo.verify(folder)
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    with pytest.raises(OSError, match=r"model\.safetensors is damaged or missing; reinstall tersor"):
        zoo.verify(folder)
    weights.unlink()
    with pytest.raises(OSError, match="damaged or missing"):
        zoo.verify(folder)


def test_unknown_model_names_those_there_are():
    with pytest.raises(ValueError, match=r"no model 'tinylm' in the zoo; there are: .*tiny-lm"):
        zoo.path("tinylm")


def test_split_depends_on_the_name_alone_and_keeps_its_shares():
    names = [f"package/document-{i}" for i in range(5000)]
    counts = collections.Counter(map(corpus.split_of, names))
    assert 0.02 < counts["test"] / 5000 < 0.06
    assert 0.02 < counts["validation"] / 5000 < 0.06
    assert [corpus.split_of(name) for name in names] == [corpus.split_of(name) for name in names]


def test_held_out_text_comes_from_test_documents_and_calibration_from_training_documents():
    documents = [
        {
            "source": source.package,
            "name": f"{source.package}/{i}",
            "split": split,
            "text": f"{split} of {source.package}\n",
        }
        for source in corpus.SOURCES
        for i, split in enumerate(["train", "validation", "test"])
    ]
    held_out, calibration = corpus.held_out_text(documents), corpus.calibration_text(documents)
    assert "test of r-cran-janeaustenr" in held_out
    assert "train" not in held_out
    assert "validation" not in held_out
    assert "test of" not in calibration
    assert "validation" not in calibration


def test_shipped_texts_share_no_paragraph(held_out_text):
    calibration = zoo.calibration_text()
    long = lambda text: {p for p in text.split("\n\n") if len(p) > 80}  # noqa: E731
    assert long(held_out_text)
    assert not long(held_out_text) & long(calibration)


def test_r_strings_are_read():
    """A character vector as R serialises it: header, encoding, type 16, and for each string its flags and length."""
    word = lambda n: n.to_bytes(4, "big")  # noqa: E731
    strings = b"".join(word(9) + word(len(s)) + s for s in (b"CHAPTER I", b"", b"It was."))
    record = b"X\n" + word(3) + word(0x40000) + word(0x30500) + word(5) + b"UTF-8" + word(16) + word(3) + strings
    assert corpus._strings(record) == ["CHAPTER I", "", "It was."]
    assert corpus._strings(record.replace(word(16) + word(3), word(13) + word(3))) is None


@pytest.mark.parametrize("shape", [(32, 32), (16, 48), (48, 16)])
def test_orthogonalised_matrices_have_singular_values_near_one(shape, generator):
    """Muon's five steps bring singular values that are not tiny to 0.6 ... 1.3."""
    values = torch.linalg.svdvals(orthogonalise(torch.randn(shape, generator=generator)))
    assert values.max() < 1.3
    assert values.median() > 0.6
