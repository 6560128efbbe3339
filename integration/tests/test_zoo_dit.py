"""The zoo's diffusion transformers: architecture, samplers, training and measures."""

import ast
import copy
import dataclasses
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tersor.diffcache import cached, recipes
from tersor.integration import zoo
from tersor.integration.errors import UserError
from tersor.integration.zoo import dit
from tersor.integration.zoo.measure import Figure
from tersor.integration.zoo.measure import dit as measure
from tersor.integration.zoo.training import dit as training

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
SHAPES = {
    "picture": {"image_size": 12},
    "colour": {"image_size": 12, "num_channels": 3},
    "video": {"image_size": 8, "num_frames": 6, "tubelet_size": 2},
}


def small_dit(zero=False, **config):
    """A small DiT; unless `zero`, with random weights also where a fresh one has zeros."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = dit.DiT(dit.DiTConfig(**SMALL | config)).eval()
        if not zero:
            for parameter in model.parameters():
                parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def inputs(model, n=4):
    c, generator = model.config, torch.Generator().manual_seed(1)
    frames = [c.num_frames] if c.num_frames > 1 else []
    x = torch.randn(n, c.num_channels, *frames, c.image_size, c.image_size, generator=generator)
    return x, torch.linspace(0.1, 0.9, n), torch.arange(n)


class Field(nn.Module):
    """A model that is a formula; remembers its timesteps and labels."""

    num_classes = 10

    def __init__(self, formula):
        super().__init__()
        self.formula, self.calls = formula, []

    def forward(self, x, timestep, labels):
        assert timestep.shape == labels.shape == x.shape[:1]
        self.calls.append((timestep[0].item(), labels[0].item()))
        return self.formula(x, timestep[0].double().item(), labels)


# architecture


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_fresh_blocks_leave_the_stream_as_it_is_and_the_output_is_zero(shape):
    model = small_dit(zero=True, **shape)
    hidden, condition = torch.randn(3, 7, 32), torch.randn(3, 32)
    for block in model.blocks:
        assert torch.equal(block(hidden, condition), hidden)
    x, timestep, labels = inputs(model)
    assert torch.equal(model(x, timestep, labels), torch.zeros_like(x))


def test_fresh_epsilon_model_takes_the_data_for_grey():
    """v = 0 is noise = sqrt(1 - a) x and data = sqrt(a) x."""
    model = small_dit(zero=True, prediction="epsilon", image_size=12)
    x, _, labels = inputs(model)
    timestep = torch.tensor([0, 300, 700, 999])
    a = dit.alphas_cumprod()[timestep][:, None, None, None].float()
    torch.testing.assert_close(model(x, timestep, labels), (1 - a).sqrt() * x)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_unpatchify_is_the_inverse_of_patchify(shape):
    model = small_dit(**shape)
    x, _, _ = inputs(model)
    tokens = model.patchify(x)
    assert tokens.shape[1] == len(model.position)
    assert torch.equal(model.unpatchify(tokens), x)


def test_tokens_are_in_the_order_time_height_width():
    model = small_dit(**SHAPES["video"])
    x = torch.zeros(1, 1, 6, 8, 8)
    x[0, 0, 2:4, 4:8, 0:4] = 1  # second of 3 times, second of 2 rows, first of 2 columns
    assert model.patchify(x)[0].sum(-1).nonzero().tolist() == [[1 * 4 + 1 * 2 + 0]]


def test_places_start_all_different():
    for grid in ((1, 7, 7), (4, 7, 7)):
        places = dit.sines_of_places(grid, 128)
        assert torch.pdist(places).min() > 0.5


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_every_parameter_and_input_matters(shape):
    model = small_dit(**shape)
    x, timestep, labels = inputs(model)
    out = model(x, timestep, labels)
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())
    for others in ((x, timestep.flip(0), labels), (x, timestep, labels + 1), (x.flip(0), timestep, labels)):
        assert not torch.allclose(model(*others), out, atol=1e-3)


def test_samples_of_a_batch_do_not_mix():
    model = small_dit(**SHAPES["video"])
    whole = inputs(model)
    torch.testing.assert_close(model(*whole)[1:2], model(*(part[1:2] for part in whole)))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"prediction": "data"}, 'prediction must be "velocity" or "epsilon", got \'data\''),
        ({"patch_size": 5}, "patch_size = 5 must divide 28"),
        ({"num_frames": 3, "tubelet_size": 2}, "tubelet_size = 2 must divide 3"),
    ],
)
def test_wrong_settings_are_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        dit.DiTConfig(**wrong)


# files


def test_saved_and_loaded_it_is_the_same(tmp_path):
    model = small_dit(prediction="epsilon").half()
    model.save_pretrained(tmp_path)
    loaded = dit.DiT.from_pretrained(tmp_path)
    assert loaded.config.prediction == "epsilon"
    assert {p.dtype for p in loaded.parameters()} == {torch.float16}
    for key, value in model.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[key]), key


def test_the_file_needs_torch_and_transformers_alone(tmp_path):
    path = Path(dit.__file__)
    imports = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {n.module if isinstance(n, ast.ImportFrom) else n.names[0].name for n in imports}
    assert {name.split(".")[0] for name in names} == {"math", "typing", "torch", "transformers"}
    spec = importlib.util.spec_from_file_location("loaded_from_its_path", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)  # without an entry in sys.modules
    model = small_dit()
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(module.DiT.from_pretrained(tmp_path)(*inputs(model)), model(*inputs(model)))


# samplers


def test_euler_of_a_single_picture_is_exact():
    """Where all data is d, v = (x - d) / t."""
    data = torch.linspace(-1, 1, 16).view(1, 1, 4, 4)
    model = Field(lambda x, t, _: (x - data) / t)
    for steps in (1, 2, 7):
        found = dit.euler(model, torch.randn(3, 1, 4, 4), torch.zeros(3, dtype=torch.long), steps)
        torch.testing.assert_close(found, data.expand(3, -1, -1, -1))


def test_euler_of_a_gaussian_errs_half_as_much_at_twice_the_steps():
    """Where data is normal with deviation s, x_t has the variance (1-t)^2 s^2 + t^2 and noise n ends at s n."""
    s = 0.5
    model = Field(lambda x, t, _: x * (t - (1 - t) * s**2) / ((1 - t) ** 2 * s**2 + t**2))
    noise, labels = torch.randn(50, 1, 2, 2, dtype=torch.float64), torch.zeros(50, dtype=torch.long)
    errors = [(dit.euler(model, noise, labels, steps) - s * noise).norm().item() for steps in (50, 100, 200)]
    assert errors[0] < 0.02 * noise.norm()
    assert errors[0] / errors[1] == pytest.approx(2, abs=0.1)
    assert errors[1] / errors[2] == pytest.approx(2, abs=0.05)


def test_ddim_of_a_gaussian_ends_at_its_deviation():
    """Where data is normal with deviation s, the noise in x is on average sqrt(1 - a) x / (a s^2 + 1 - a)."""
    s, alphas = 0.2, dit.alphas_cumprod()
    model = Field(lambda x, k, _: (1 - alphas[int(k)]) ** 0.5 * x / (alphas[int(k)] * s**2 + 1 - alphas[int(k)]))
    noise, labels = torch.randn(50, 1, 2, 2, dtype=torch.float64), torch.zeros(50, dtype=torch.long)
    errors = [(dit.ddim(model, noise, labels, n) - s * noise).norm() / (s * noise).norm() for n in (245, 490, 980)]
    assert errors[2] < 0.01
    assert errors[0] > errors[1] > errors[2]


def test_ddim_of_a_single_picture_is_exact():
    alphas, data = dit.alphas_cumprod(), torch.linspace(-1, 1, 16).view(1, 1, 4, 4)
    model = Field(lambda x, k, _: (x - alphas[int(k)] ** 0.5 * data) / (1 - alphas[int(k)]) ** 0.5)
    noise = torch.randn(3, 1, 4, 4, dtype=torch.float64)
    for steps in (1, 2, 7):
        found = dit.ddim(model, noise, torch.zeros(3, dtype=torch.long), steps)
        torch.testing.assert_close(found.float(), data.expand(3, -1, -1, -1))


def test_alphas_fall_from_nearly_one_to_nearly_zero():
    alphas = dit.alphas_cumprod()
    assert alphas.shape == (dit.NUM_TIMESTEPS,)
    assert (alphas.diff() < 0).all()
    assert 0.999 < alphas[0] < 1
    assert 0 < alphas[-1] < 1e-8


def test_timesteps_go_from_noise_to_data():
    zeros = Field(lambda x, t, _: torch.zeros_like(x))
    dit.euler(zeros, torch.randn(1, 1, 2, 2), torch.tensor([3]), 4)
    assert zeros.calls == [(1.0, 3), (0.75, 3), (0.5, 3), (0.25, 3)]
    for steps, expected in ((4, [979, 734, 489, 244]), (980, list(range(979, -1, -1)))):
        zeros = Field(lambda x, t, _: torch.zeros_like(x))
        dit.ddim(zeros, torch.randn(1, 1, 2, 2), torch.tensor([3]), steps)
        assert [timestep for timestep, _ in zeros.calls] == expected


def test_guidance_calls_with_and_without_labels():
    zeros = Field(lambda x, t, _: torch.zeros_like(x))
    dit.euler(zeros, torch.randn(1, 1, 2, 2), torch.tensor([3]), 2, guidance=2.0)
    assert [label for _, label in zeros.calls] == [3, 10, 3, 10]


@pytest.mark.parametrize("sampler", [dit.euler, dit.ddim])
def test_guidance_of_one_is_none_and_of_zero_ignores_labels(sampler):
    model = small_dit(image_size=8, prediction="velocity" if sampler is dit.euler else "epsilon")
    noise, _, labels = inputs(model)
    with torch.no_grad():
        plain = sampler(model, noise, labels, 5)
        torch.testing.assert_close(sampler(model, noise, labels, 5, guidance=1.0), plain)
        unlabelled = sampler(model, noise, torch.full_like(labels, 10), 5)
        torch.testing.assert_close(sampler(model, noise, labels, 5, guidance=0.0), unlabelled)
        assert not torch.allclose(sampler(model, noise, labels, 5, guidance=3.0), plain, atol=1e-3)


# diffcache


@pytest.mark.parametrize("guidance", [None, 2.0])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_fora_attaches_skips_and_gives_the_model_back(shape, guidance):
    model = small_dit(**shape)
    noise, _, labels = inputs(model)
    with torch.no_grad():
        plain = dit.euler(model, noise, labels, 6, guidance)
        with pytest.warns(RuntimeWarning, match="reused nothing"), cached(model, recipes.fora(1)):
            assert torch.equal(dit.euler(model, noise, labels, 6, guidance), plain)
        with cached(model, recipes.fora(3)) as session:
            assert not torch.equal(dit.euler(model, noise, labels, 6, guidance), plain)
        assert session.stats.skipped == 2 * session.stats.executed
        assert torch.equal(dit.euler(model, noise, labels, 6, guidance), plain)


# training


def tiny(name, **changes):
    """`name`'s training with a small model and eight steps."""
    config = copy.deepcopy(training.TRAININGS[name].config)
    for key, value in SMALL.items():
        setattr(config, key, value)
    settings = {"config": config, "steps": 8, "batch_size": 6} | changes
    return dataclasses.replace(training.TRAININGS[name], **settings)


def pictures(name, n=40):
    generator, side = torch.Generator().manual_seed(0), 10 if "video" in name else 28
    return (
        torch.randint(256, (n, side, side), generator=generator, dtype=torch.uint8),
        torch.randint(10, (n,), generator=generator),
    )


@pytest.mark.parametrize("name", training.TRAININGS)
def test_stopped_training_ends_with_the_same_weights(name, tmp_path):
    def start(folder):
        return training.start(tiny(name), tmp_path / folder, *pictures(name), seed=0)

    whole, stopped = start("whole"), start("stopped")
    losses = [whole.advance() for _ in range(whole.steps)]
    found = [stopped.advance() for _ in range(5)]
    stopped.save()
    stopped.advance()  # lost
    resumed = start("stopped")
    assert found + [resumed.advance() for _ in range(3)] == losses
    for key in whole.averaged:
        assert torch.equal(whole.model.state_dict()[key], resumed.model.state_dict()[key]), key
        assert torch.equal(whole.averaged[key], resumed.averaged[key]), key


@pytest.mark.parametrize("name", training.TRAININGS)
def test_a_loss_falls(name, tmp_path):
    black = torch.zeros_like(pictures(name)[0])
    run = training.start(tiny(name, steps=40, batch_size=16), tmp_path, black, pictures(name)[1], seed=0)
    losses = [run.advance() for _ in range(40)]
    assert np.mean(losses[-5:]) < 0.9 * losses[0]


@pytest.mark.parametrize("name", training.TRAININGS)
def test_a_run_writes_what_the_zoo_loads_and_its_card(name, tmp_path, monkeypatch):
    """The averaged weights, rounded once."""
    settings = tiny(name)
    monkeypatch.setattr(training, "read", lambda kind, split: pictures(name))
    monkeypatch.setattr(measure, "figures", lambda *_: [Figure("called right", 0.5, 0.1, "guessing", bar=0.4)])
    training.train(settings, tmp_path, lambda *_: None)
    folder = tmp_path / "model"
    zoo.verify(folder)
    run = training.start(settings, tmp_path, *pictures(name), seed=0)
    shipped = dit.DiT.from_pretrained(folder).state_dict()
    assert run.step == 8
    assert all(torch.equal(shipped[key], value.half()) for key, value in run.averaged.items())
    assert json.loads((folder / "training.json").read_text())["steps"] == 8
    card = (folder / "README.md").read_text()
    assert "| called right | 50.00 % | 40.00 % | 10.00 % (guessing) |" in card
    example = card.split("```python\n")[1].split("```")[0].replace(f'zoo.load("{name}")', "shipped, None")
    variables = {"shipped": dit.DiT.from_pretrained(folder, dtype=torch.float32).eval()}
    exec(example.replace("steps=50", "steps=1"), variables)  # the card's code runs
    assert len(variables["videos" if "video" in name else "pictures"]) == 10


@pytest.mark.parametrize("name", ["tiny-dit", "tiny-dit-video"])
def test_velocity_leads_from_data_to_noise(name):
    settings = tiny(name, batch_size=200)
    x, timestep, labels, velocity, _ = training.batch(settings, *pictures(name), [0, 3])
    t = timestep.view(-1, *[1] * (x.ndim - 1))
    data, noise = x - t * velocity, x + (1 - t) * velocity
    assert data.abs().max() < 1 + 1e-5
    assert noise.mean().abs() < 0.01
    assert noise.std() == pytest.approx(1, abs=0.01)
    assert 0 < timestep.min() < timestep.max() < 1
    assert timestep.median() == pytest.approx(0.5, abs=0.1)
    assert 0.04 < (labels == 10).float().mean() < 0.18


def test_epsilon_is_the_noise_in_x():
    x, timestep, _, noise, unit = training.batch(
        tiny("tiny-dit-eps", batch_size=200), *pictures("tiny-dit-eps"), [0, 3]
    )
    a = dit.alphas_cumprod()[timestep][:, None, None, None]
    torch.testing.assert_close(unit, a.sqrt().float())
    clear = timestep < 900  # beyond, rounding is divided by nearly 0
    data = ((x - (1 - a).sqrt() * noise) / a.sqrt())[clear]
    assert data.abs().max() < 1 + 1e-4
    known = training.scaled(pictures("tiny-dit-eps")[0]).flatten(1).double()
    assert torch.cdist(data.flatten(1), known).min(1).values.max() < 1e-3  # neither moved nor mirrored


@pytest.mark.parametrize("name", training.TRAININGS)
def test_batches_depend_on_seed_and_step_alone(name):
    first, same, other = (training.batch(tiny(name), *pictures(name), [0, step]) for step in (3, 3, 4))
    assert all(torch.equal(a, b) for a, b in zip(first, same))
    assert not torch.equal(first[0], other[0])


# moving digits


def videos(n=40, seed=0):
    """Discs and their outlines, moving."""
    square = (torch.arange(10) - 4.5) ** 2
    distance = (square[:, None] + square).sqrt()
    shapes = torch.stack([(distance < 4).float(), ((distance > 2) & (distance < 4)).float()])
    labels = torch.arange(n) % 2
    digits = (255 * shapes[labels]).to(torch.uint8)
    moving = training.make_data("moving-digits", digits, np.random.default_rng(seed))
    return moving, labels, digits[:2], labels[:2]


def test_moving_digits_stay_whole_and_bounce():
    moving, *_ = videos(200)
    assert moving.shape == (200, 1, 8, 20, 20)
    ink = (moving + 1).sum((1, 3, 4))
    torch.testing.assert_close(ink, ink[:, :1].expand_as(ink), rtol=1e-3, atol=0)
    path = measure.centres((moving[:, 0].flatten(0, 1) + 1) / 2).view(200, 8, 2)
    assert path.min() > 4.4  # the digit's middle is half a digit away from the edge
    assert path.max() < 14.6
    steps = path.diff(dim=1)
    assert (steps[:, 1:] * steps[:, :-1] < -0.1).any(), "none bounced"
    assert steps.norm(dim=-1).max(1).values.min() > 0.95
    assert steps.norm(dim=-1).max() < 2.05


def test_training_videos_are_found_right_and_steady():
    found = measure.videos(*videos())
    assert found.accuracy == found.steady == 1
    assert 1 < found.speed < 2


@pytest.mark.parametrize("wrong", ["disorder", "still", "noise", "jumping"])
def test_wrong_videos_are_not_steady(wrong):
    moving, *rest = videos()
    generator = torch.Generator().manual_seed(0)
    changed = {
        "disorder": moving[:, :, torch.randperm(8, generator=generator)],
        "still": moving[:, :, :1].expand_as(moving),
        "noise": torch.randn(moving.shape, generator=generator).clamp(-1, 1),
        "jumping": torch.cat([moving[:, :, :4], moving.roll(1, 0)[:, :, 4:]], 2).roll(1, 0)[
            :, :, [0, 4, 1, 5, 2, 6, 3, 7]
        ],
    }
    assert measure.videos(changed[wrong], *rest).steady < 0.1


def test_videos_of_other_digits_are_found_wrong():
    moving, labels, *known = videos()
    assert measure.videos(moving, 1 - labels, *known).accuracy == 0


# measures of pictures


def test_distance_of_gaussians_is_the_formula():
    """Means apart by d, deviations p and q of each of 4 features: d^2 + 4 (p - q)^2."""
    generator = torch.Generator().manual_seed(0)
    some, others = torch.randn(2, 50_000, 4, dtype=torch.float64, generator=generator)
    assert measure.frechet_distance(some, some) == pytest.approx(0, abs=1e-6)
    assert measure.frechet_distance(2 * some + 3, others) == pytest.approx(4 * 9 + 4 * 1, rel=0.02)
    assert measure.frechet_distance(others, 2 * some + 3) == pytest.approx(4 * 9 + 4 * 1, rel=0.02)


def test_noise_and_class_means_are_far_from_pictures():
    """The measure fails what has learnt nothing, and what shows each class, but always the same picture of it."""
    pytest.importorskip("datasets", reason="the zoo's data needs the library datasets")
    try:
        pictures, labels = training.read("clothes", "validation")
    except UserError as error:
        pytest.skip(str(error))
    classifier, real = zoo.load("tiny-cnn")[0], training.scaled(pictures[:600])
    reference, others = measure.features(classifier, real).split([400, 200])
    noise = torch.randn(200, 1, 28, 28, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    means = measure.class_means(pictures, labels)[measure.every_class(10, 20)]
    near = measure.frechet_distance(others, reference)
    assert 2 * near < measure.frechet_distance(measure.features(classifier, means), reference)
    assert 4 * near < measure.frechet_distance(measure.features(classifier, noise), reference)
    assert measure.accuracy(classifier, real, labels[:600]) > 0.88
    assert measure.accuracy(classifier, noise, measure.every_class(10, 20)) < 0.2


def test_pictures_reach_the_classifier_as_its_processor_would_give_them():
    _, processor = zoo.load("tiny-cnn")
    grey = torch.randint(256, (3, 28, 28), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    expected = processor([image.numpy()[..., None] for image in grey], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(measure.as_pixels(training.scaled(grey)), expected)
