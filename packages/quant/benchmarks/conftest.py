"""The models that are measured, each read once."""

from functools import cache

import pytest
import torch

from .measured import Subject

# each of them imports a library that hardly anyone has installed
collect_ignore = ["peers"]


@pytest.fixture(scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def subject(zoo, held_out_text):
    """`subject("tiny-lm")`; `subject("gemma-3-270m")`, which is measured on fewer rows."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    @cache
    def named(name: str) -> Subject:
        if name in zoo.names():
            model, tokenizer = zoo.load(name)
            return Subject.of(name, model, tokenizer, held_out_text)
        models = pytest.importorskip("tersor.integration.models")
        try:
            directory = models.locate(name)
        except models.UserError as error:
            pytest.skip(str(error))
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        return Subject.of(name, model, AutoTokenizer.from_pretrained(directory), held_out_text, rows=16)

    return named
