"""Teacher: what is descended in parts."""

from weakref import WeakSet

import pytest
import torch

from tersor.quant import teacher as module
from tersor.quant.teacher import Teacher, rows


class Saved:
    """What autograd keeps of one tensor."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


@pytest.fixture
def two_of_five(make_model, ids, monkeypatch) -> Teacher:
    """Of five sequences, one of them padded, two are run together; the model has changed since it taught."""
    model = make_model()
    model.lm_head.weight.data *= 40
    mask = torch.ones_like(ids[:5])
    mask[3, -7:] = 0
    monkeypatch.setattr(module, "_LOGITS", 2 * ids.shape[1] * model.config.vocab_size)
    teacher = Teacher(model, rows([{"input_ids": ids[:5], "attention_mask": mask}]))
    model.model.layers[0].mlp.down_proj.weight.data *= 1.5
    return teacher


def gradients(model) -> list[torch.Tensor]:
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    return found


def test_parts_add_up_to_the_gradient_of_the_sum(two_of_five):
    torch.cat([*two_of_five.divergences(range(5))]).sum().backward()
    whole = gradients(two_of_five.model)
    two_of_five.backward(range(5))
    assert any(gradient.abs().max() > 1e-3 for gradient in whole)
    torch.testing.assert_close(gradients(two_of_five.model), whole, rtol=1e-4, atol=1e-4)


def test_gradients_of_float16_are_not_lost(make_model, ids):
    """Of a mean over the tokens of a model that has hardly changed they would be: the vocabulary shares what is left."""
    found = {}
    for dtype in (torch.float32, torch.float16):
        model = make_model(dtype=dtype)
        teacher = Teacher(model, rows([{"input_ids": ids}]))
        model.model.layers[0].mlp.down_proj.weight.data *= 1.02
        teacher.backward(range(len(ids)))
        found[dtype] = torch.cat([gradient.flatten().float() for gradient in gradients(model)])
    assert torch.cosine_similarity(*found.values(), dim=0) > 0.9


def test_rows_with_and_without_a_mask_are_not_run_together(make_model, ids):
    mask = torch.ones_like(ids[:2])
    mask[0, -7:] = 0
    masked = {"input_ids": ids[:2], "attention_mask": mask}
    for data in ([{"input_ids": ids[2:4]}, masked], [masked, {"input_ids": ids[2:4]}]):
        teacher = Teacher(make_model(), rows(data))
        assert sorted(teacher.num_tokens) == [ids.shape[1] - 7, *[ids.shape[1]] * 3]
        assert teacher.divergence() == pytest.approx(0, abs=1e-6)


def test_one_part_is_held_at_a_time(two_of_five):
    held, at_calls = WeakSet(), []

    def save(tensor):
        held.add(saved := Saved(tensor))
        return saved

    handle = two_of_five.model.register_forward_pre_hook(lambda *_: at_calls.append(len(held)))
    with handle, torch.autograd.graph.saved_tensors_hooks(save, lambda saved: saved.tensor):
        two_of_five.backward(range(5))
        assert at_calls == [0, 0, 0]
        torch.cat([*two_of_five.divergences(range(5))])
    assert at_calls[-1] > 0
