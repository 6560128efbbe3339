"""Trains the zoo's masked diffusion language model.

    python -m tersor.integration.zoo.training.corpus ~/.cache/tersor/corpus
    tersor zoo train tiny-dlm

`tiny-dlm` learns to fill in prose and the tasks of `tasks.py`, short lists first; then the tasks alone. Writes RUN/model
(what ships, with its card) and a checkpoint per stage: stopped and started again, it goes on. Whatever is drawn depends
on the seed and the step alone.
"""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tokenizers import AddedToken
from torch import Tensor

from tersor.integration import zoo
from tersor.integration.zoo.dlm import MaskedDiffusionConfig, MaskedDiffusionLlama, choose_masked, denoise, masked_loss
from tersor.integration.zoo.measure import Figure
from tersor.integration.zoo.measure.dlm import figures
from tersor.integration.zoo.tasks import Task, Tasks
from tersor.integration.zoo.training.corpus import SOURCES
from tersor.integration.zoo.training.run import (
    Progress,
    Run,
    device,
    join,
    optimizers,
    trapezoid,
    write_record,
    write_sums,
)
from tersor.integration.zoo.training.text import Text, documents

MASK = "<|mask|>"
ROOMS = (8, 16, 24, 32)  # tokens for an answer and the end-of-text tokens that fill it up
WINDOWS = (64, 96, 128)  # tokens of prose


@dataclass(frozen=True)
class Stage:
    """A part of a training, with learning rates that rise and fall once.

    Args:
        tasks: tasks per step, by kind.
        text_tokens: tokens of the corpus per step, about.
        text_weight: of their loss, beside that of the tasks.
        longest: items of the longest lists, from the share of the steps that are done.
        learning_rate: AdamW's at its highest, for embeddings and vectors.
        muon_rate: Muon's at its highest, for the other matrices.
    """

    name: str
    steps: int
    tasks: tuple[tuple[str, int], ...]
    text_tokens: int
    longest: tuple[tuple[float, int], ...]
    learning_rate: float
    muon_rate: float
    text_weight: float = 0.5
    weight_decay: float = 0.01

    def longest_at(self, done: float) -> int:
        return next(items for start, items in reversed(self.longest) if done >= start)


@dataclass(frozen=True)
class Training:
    """A masked diffusion language model and how it is trained: all that its weights depend on.

    Args:
        architecture: the config in words.
        config: fields of `MaskedDiffusionConfig` that are not its defaults.
        start: a model of the zoo with the same shapes, whose weights it starts from.
    """

    name: str
    architecture: str
    config: tuple[tuple[str, Any], ...]
    stages: tuple[Stage, ...]
    start: str | None = None


TINY_DLM = Training(
    "tiny-dlm",
    "6 layers, width 256, 4 query and 2 key/value heads of 64, feed-forward 768, tied embeddings",
    (
        ("vocab_size", 4097),
        ("mask_token_id", 4096),
        ("hidden_size", 256),
        ("intermediate_size", 768),
        ("num_hidden_layers", 6),
        ("num_attention_heads", 4),
        ("num_key_value_heads", 2),
        ("head_dim", 64),
        ("max_position_embeddings", 1024),
        ("tie_word_embeddings", True),
        ("bos_token_id", 0),
        ("eos_token_id", 0),
    ),
    (
        Stage(
            "both",
            2800,
            tasks=(("copy", 6), ("reverse", 8), ("shuffle", 5), ("sort", 10), ("add", 20), ("code", 5)),
            text_tokens=512,
            longest=((0.0, 3), (0.08, 5), (0.16, 8)),
            learning_rate=1.5e-3,
            muon_rate=4e-3,
        ),
        # a step of Muon costs as much as the gradients of the first stage's 54 tasks: more of them at a time
        Stage(
            "tasks",
            1800,
            tasks=(("copy", 16), ("reverse", 20), ("shuffle", 16), ("sort", 24), ("add", 60), ("code", 4)),
            text_tokens=128,
            longest=((0.0, 8),),
            learning_rate=1.5e-3,
            muon_rate=4e-3,
        ),
    ),
    start="tiny-lm",
)
TRAININGS = {training.name: training for training in (TINY_DLM,)}


class Batch(NamedTuple):
    ids: Tensor  # (n, seq)
    answers: Tensor  # where there is what may be masked
    attended: Tensor | None  # where there is anything


def start(training: Training, stage: Stage, folder: Path, model: Any, text: Text, tokenizer: Any, seed: int) -> Run:
    """The run of one `stage` in `folder`, from `model` or from its checkpoint."""
    where = device()
    model = model.to(where).train()
    tasks = Tasks(tokenizer)

    before = sum(each.steps for each in training.stages[: training.stages.index(stage)])

    def loss(step: int) -> Tensor:
        drawn_from = [seed, before + step]
        random = np.random.default_rng(drawn_from)
        generator = torch.Generator().manual_seed(int(random.integers(2**62)))
        longest = stage.longest_at(step / stage.steps)
        wanted = [
            tasks.task(kind, [*drawn_from, number], longest=longest)
            for kind, count in stage.tasks
            for number in range(count)
        ]
        window = int(random.choice(WINDOWS))
        text_batch = of_text(text, stage.text_tokens // window, window, random)
        on_text = batch_loss(model, text_batch, generator)
        batches = of_tasks(wanted, random)
        tokens = [int(batch.answers.sum()) for batch in batches]
        on_tasks = [batch_loss(model, batch, generator) * n / sum(tokens) for batch, n in zip(batches, tokens)]
        return torch.stack(on_tasks).sum() + stage.text_weight * on_text

    tuned = optimizers(
        model,
        stage.learning_rate,
        weight_decay=stage.weight_decay,
        muon_rate=stage.muon_rate,
        outside=("embed",),
    )
    return Run(folder, f"{training}, {stage}, seed {seed}", model, tuned, stage.steps, loss, trapezoid)


def batch_loss(model: Any, batch: Batch, generator: torch.Generator) -> Tensor:
    where, masked = model.device, choose_masked(batch.answers, generator)
    attended = None if batch.attended is None else batch.attended.to(where)
    return masked_loss(model, batch.ids.to(where), batch.answers.to(where), masked.to(where), attended)


def of_tasks(tasks: list[Task], random: np.random.Generator, parts: int = 3) -> list[Batch]:
    """Each with a room for its answer that is drawn from `ROOMS`; the shortest in the first of the `parts`.

    A room is filled up with end-of-text tokens, 0. They are learnt as the answer is, so how long it is to be is known
    before its tokens are.
    """
    rooms = [_room(len(task.answer_ids) + 1, random) for task in tasks]
    widths = np.array([len(task.prompt_ids) + room for task, room in zip(tasks, rooms)])
    found = []
    for part in np.array_split(np.argsort(widths, kind="stable"), parts):
        ids = torch.zeros(len(part), int(widths[part].max()), dtype=torch.long)
        answers, attended = torch.zeros_like(ids, dtype=torch.bool), torch.zeros_like(ids, dtype=torch.bool)
        for row, number in enumerate(part):
            task, width = tasks[number], widths[number]
            whole = [*task.prompt_ids, *task.answer_ids]
            ids[row, : len(whole)] = torch.tensor(whole)
            answers[row, len(task.prompt_ids) : width] = True
            attended[row, :width] = True
        found.append(Batch(ids, answers, attended))
    return found


def of_text(text: Text, rows: int, window: int, random: np.random.Generator) -> Batch:
    ids = text.windows(rows, window - 1, random)
    return Batch(ids, torch.ones_like(ids, dtype=torch.bool), None)


def _room(least: int, random: np.random.Generator) -> int:
    """One of `ROOMS`, `least` or more; the longer the rarer, so that each has as many tokens."""
    rooms = np.array([room for room in ROOMS if room >= least])
    return int(random.choice(rooms, p=1 / rooms / (1 / rooms).sum()))


def train(training: Training, folder: Path, progress: Progress, seed: int = 0) -> dict[str, Any]:
    """Train in `folder`, or go on there; returns what its training.json states.

    Raises:
        UserError: the corpus has not been fetched.
    """
    tokenizer = with_mask(zoo.load("tiny-lm")[1])
    model, text, runs = fresh(training, seed), Text(documents("train"), tokenizer), []
    for stage in training.stages:
        runs.append(start(training, stage, folder / stage.name, model, text, tokenizer, seed))
        runs[-1].finish(progress)
    shipped = folder / "model"
    model.cpu().bfloat16().save_pretrained(shipped)  # pyright: ignore[reportCallIssue]
    tokenizer.save_pretrained(shipped)
    write_sums(shipped)
    found = join(runs)
    write_record(shipped, found, seed)
    model = MaskedDiffusionLlama.from_pretrained(shipped, dtype=torch.float32).eval()
    measured = figures(training.name, model, tokenizer)
    sizes = {"parameters": model.num_parameters(), "nbytes": (shipped / "model.safetensors").stat().st_size}
    written = card(training, found | sizes | {"seed": seed}, measured, samples(model, tokenizer))
    (shipped / "README.md").write_text(written)
    return found


def with_mask(tokenizer: Any) -> Any:
    """A copy of `tokenizer` with the mask token, the last of its vocabulary."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens({"mask_token": AddedToken(MASK, special=True, normalized=False)})
    return tokenizer


def fresh(training: Training, seed: int) -> MaskedDiffusionLlama:
    """Random weights, or those of `training.start`; then the mask token's embedding is the mean of all others."""
    with torch.random.fork_rng(devices=[]):  # transformers draws weights from the global generator
        torch.manual_seed(seed)
        model = MaskedDiffusionLlama(MaskedDiffusionConfig(**dict(training.config)))
    if training.start:
        weights = zoo.load(training.start)[0].state_dict()
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            weights[name] = torch.cat([weights[name], weights[name].mean(0, keepdim=True)])
        model.load_state_dict(weights)
    return model


def samples(model: Any, tokenizer: Any) -> list[str]:
    """Prose that continues a few words: 48 tokens, one per step, at temperature 0.5."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for beginning in ("It was a very", "The package", "def read_file(path):"):
        prompt = tokenizer(beginning, add_special_tokens=False).input_ids
        ids = denoise(model, prompt, 48, 48, 16, temperature=0.5, generator=generator)
        found.append(tokenizer.decode(ids[0]))
    return found


def card(training: Training, run: dict[str, Any], measured: list[Figure], written: list[str]) -> str:
    """Markdown: use, data, training, what was measured, samples, limits."""
    sources = "\n".join(f"| {source.package} | {source.licence} | {source.weight:.0%} |" for source in SOURCES)
    rows = "\n".join(
        f"| {f.metric} | {f.shown(f.value)} | {f.shown(f.bar) if f.bar else ''} | {f.shown(f.baseline)} ({f.baseline_name}) |"
        for f in measured
    )
    shown = "\n\n".join(f"```text\n{sample}\n```" for sample in written)
    begun = (
        f"the weights of `{training.start}`, which writes from left to right" if training.start else "random weights"
    )
    stages = "\n".join(f"| stage `{stage.name}` | {_described(stage)} |" for stage in training.stages)
    return f"""# {training.name}

A masked diffusion language model (LLaDA, arXiv:2502.09992) of {run["parameters"]:,} parameters. It solves tasks that a
program can check (`tasks.py`), so that methods of decoding can be compared by what they get right. It also writes prose,
which is of no use.

```python
from tersor.integration import zoo
from tersor.integration.zoo.dlm import denoise

model, tokenizer = zoo.load("{training.name}")
prompt = [tokenizer.bos_token_id, *tokenizer("reverse: morning friend lady =>").input_ids]
print(tokenizer.decode(denoise(model, prompt, answer_length=16, steps=16, block_length=16)[0]))
```

| | |
| --- | --- |
| architecture | `MaskedDiffusionLlama` (`dlm.py`): {training.architecture}, RoPE; every token sees every other |
| tokenizer | that of `tiny-lm` and `{MASK}`, the last of 4097 tokens; `<|endoftext|>` is BOS and EOS |
| answers | of up to 15 tokens, filled up with EOS to a room of {", ".join(map(str, ROOMS[:-1]))} or {ROOMS[-1]} |
| weights | bfloat16, {run["nbytes"]:,} bytes; trained in float32 |

## Training

| | |
| --- | --- |
| began with | {begun} |
{stages}
| loss | `masked_loss`: n of an answer's L tokens are masked, n uniform in 1 ... L, and weigh L / n |
| optimiser | Muon for the matrices inside, AdamW (betas 0.9, 0.95) for embeddings and vectors |
| schedule | in each stage rising for 3 % of its steps, steady, then linearly to zero over the last 40 % |
| steps | {run["steps"]:,} |
| time | {run["minutes"]:.0f} minutes |
| hardware | {run["hardware"]} |
| code | `training/dlm.py`, seed {run["seed"]} |

A tenth of all tasks, by a hash of their items, is never trained on: of those that are measured, no pair of numbers and
no list has been seen, in whatever order.

| Debian package | licence | share of the text |
| --- | --- | --- |
{sources}

## Measured

The weights as shipped, in float32; answers in a room of 16 tokens, one token per step, the surest first.

| | {training.name} | wanted | without learning |
| --- | --- | --- | --- |
{rows}

## Samples

48 tokens after the first words, in blocks of 16, one token per step, at temperature 0.5.

{shown}

## Limits

- It knows no other tasks than these and no longer lists; its prose has no sense beyond a few words.
- Of a shuffle its tokens are right one by one; written at once they repeat one another. That is what it is for.
"""


def _described(stage: Stage) -> str:
    tasks = ", ".join(f"`{kind}` {count}" for kind, count in stage.tasks)
    lengths = ", ".join(f"{items} from {done:.0%}" for done, items in stage.longest)
    return (
        f"{stage.steps:,} steps; per step tasks ({tasks}), of which answers alone are masked, and about "
        f"{stage.text_tokens} tokens of text in windows of {WINDOWS[0]} to {WINDOWS[-1]}, their loss weighing "
        f"{stage.text_weight:g}; longest lists, in items: {lengths} of the steps; learning rates at most "
        f"{stage.muon_rate:g} (Muon) and {stage.learning_rate:g} (AdamW)"
    )
