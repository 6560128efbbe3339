"""Trains the zoo's vision-language model, `tiny-vlm`.

    tersor zoo train tiny-vlm

The vision tower is `tiny-vit`, frozen; projector and language model learn from scratch to answer questions about
canvases of training images (`canvas.py`), few cells first. Writes RUN/model (what ships, with its card) and a
checkpoint per stage: stopped and started again, it goes on. Whatever is drawn depends on the seed and the step alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    AddedToken,
    AutoModelForImageTextToText,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaProcessor,
    ViTConfig,
)

from tersor.integration import zoo
from tersor.integration.zoo.canvas import NAMES, PLACES, SIDE, Canvas, Canvases, Question
from tersor.integration.zoo.measure import Figure
from tersor.integration.zoo.training import images
from tersor.integration.zoo.training.run import (
    Progress,
    Run,
    device,
    join,
    num_parameters,
    optimizers,
    trapezoid,
    write_record,
    write_sums,
)

PATCH = 4


@dataclass(frozen=True)
class Stage:
    """A part of a training, with learning rates that rise and fall once.

    Args:
        cells: of a canvas at most, from the share of the stage that is done; every other canvas may have fewer.
        tokens: per step, about, those of the images included.
        per_kind: questions of each kind about a canvas, at most.
        learning_rate: AdamW's at its highest, for embeddings and vectors.
        muon_rate: Muon's at its highest, for the other matrices.
    """

    name: str
    steps: int
    cells: tuple[tuple[float, int], ...]
    tokens: int = 1400
    per_kind: int = 5
    learning_rate: float = 2e-3
    muon_rate: float = 5e-3
    weight_decay: float = 0.01

    def size(self, done: float) -> int:
        return next(cells for start, cells in reversed(self.cells) if done >= start)


@dataclass(frozen=True)
class Training:
    """A vision-language model and how it is trained.

    Args:
        purpose: what it is for, a sentence for its card.
        architecture: the config in words.
        text_config: of the language model, for the vocabulary of `extended`.
        tower: a classifier of the zoo; the features before its last layer are what is projected.
        bar: share of the answers about canvases of test images that must be right.
    """

    name: str
    purpose: str
    architecture: str
    text_config: LlamaConfig
    stages: tuple[Stage, ...]
    tower: str = "tiny-vit"
    bar: float = 0.85


TINY_VLM = Training(
    "tiny-vlm",
    "Most of the 441 visual tokens of a canvas are redundant: made for methods that merge or drop them.",
    "`LlavaForConditionalGeneration`: `tiny-vit` without its last layer and its class token, a projector of two layers, "
    "`LlamaForCausalLM` with 6 layers, width 128, 4 query and 2 key/value heads of 32, feed-forward 384, tied "
    "embeddings, RoPE",
    LlamaConfig(
        vocab_size=4116,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    ),
    (
        # counting and finding are not learnt on nine cells before they are on a few
        Stage("lessons", 6500, ((0.0, 1), (0.03, 2), (0.08, 3), (0.2, 5), (0.35, 9))),
        Stage("whole", 4500, ((0.0, 9),), tokens=2800, per_kind=9),
    ),
)
TRAININGS = {TINY_VLM.name: TINY_VLM}


class Batch(NamedTuple):
    """Canvases, each followed by questions that see the canvas and not one another, as if each was asked alone."""

    input_ids: Tensor  # (batch, seq)
    pixel_values: Tensor  # (tiles, 1, 28, 28)
    attention_mask: Tensor  # (batch, 1, seq, seq), True where the row sees the column
    position_ids: Tensor  # (batch, seq)
    # number of the question that a token answers, counted over the batch; -1 where it answers none
    answers: Tensor  # (batch, seq)


def batch(processor: Any, canvases: Sequence[Canvas], questions: Sequence[Sequence[Question]]) -> Batch:
    """One row per canvas; an answer ends with <|endoftext|>."""
    tiles = [tile for canvas in canvases for tile in canvas.tiles()]
    read = processor(text=[canvas.prompt() for canvas in canvases], images=tiles)
    rows = []
    asked = 0
    for canvas_ids, about in zip(read["input_ids"], questions):
        ids, part, place, answer = list(canvas_ids), [0] * len(canvas_ids), [*range(len(canvas_ids))], []
        answer += [-1] * len(ids)
        for number, question in enumerate(about, 1):
            before, after = (processor.tokenizer(text).input_ids for text in (question.text, question.answer))
            after = [*after, processor.tokenizer.eos_token_id]
            ids += before + after
            part += [number] * len(before + after)
            place += range(len(canvas_ids), len(canvas_ids) + len(before + after))
            answer += [-1] * len(before) + [asked] * len(after)
            asked += 1
        rows.append((ids, part, place, answer))
    width = max(len(row[0]) for row in rows)
    padded = [[[*column, *[fill] * (width - len(column))] for column, fill in zip(row, (0, -1, 0, -1))] for row in rows]
    input_ids, part, place, answer = torch.tensor(padded).unbind(1)
    sees = (part[:, None, :] == 0) | (part[:, None, :] == part[:, :, None])
    mask = sees.tril()[:, None]
    return Batch(input_ids, torch.as_tensor(np.stack(read["pixel_values"])), mask, place, answer)


def predictions(model: Any, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Of all tokens of answers: the logits that predict them (n, vocab), the tokens, and the numbers of the questions."""
    where = model.device
    hidden = model.model(
        input_ids=batch.input_ids.to(where),
        pixel_values=batch.pixel_values.to(where),
        attention_mask=batch.attention_mask.to(where),
        position_ids=batch.position_ids.to(where),
        use_cache=False,
    ).last_hidden_state
    answers = batch.answers[:, 1:] >= 0
    logits = model.lm_head(hidden[:, :-1][answers.to(where)])
    return logits, batch.input_ids[:, 1:][answers].to(where), batch.answers[:, 1:][answers].to(where)


def start(
    training: Training, stage: Stage, folder: Path, canvases: Canvases, model: Any, processor: Any, seed: int
) -> Run:
    """The run of one `stage` in `folder`, from `model` or from its checkpoint."""
    model = model.to(device()).train()
    before = sum(each.steps for each in training.stages[: training.stages.index(stage)])

    def loss(step: int) -> Tensor:
        most = stage.size(step / stage.steps)
        per_kind = min(stage.per_kind, most + 1)
        drawn, questions = [], []
        # about 51 tokens a tile and 10 a question
        for number in range(max(1, round(stage.tokens / (51 * most + 20 * per_kind)))):
            random = np.random.default_rng([seed, before + step, number, 1])
            # were all of one size, tiles would be found by their distance and not by the names of their places
            cells = int(random.integers((most + 1) // 2, most + 1)) if number % 2 else most
            drawn.append(canvases.draw([seed, before + step, number], cells))
            questions.append(drawn[-1].questions(random, per_kind))
        logits, wanted, _ = predictions(model, batch(processor, drawn, questions))
        return F.cross_entropy(logits, wanted)

    tuned = optimizers(
        model,
        stage.learning_rate,
        weight_decay=stage.weight_decay,
        muon_rate=stage.muon_rate,
        outside=("embed", "lm_head"),
    )
    settings = f"{training}, {stage}, seed {seed}, {len(canvases.images)} images"
    return Run(folder, settings, model, tuned, stage.steps, loss, trapezoid)


def fresh(training: Training, seed: int) -> tuple[Any, Any]:
    """The model, its tower trained and all else random, and its processor."""
    classifier, image_processor = zoo.load(training.tower)
    tokenizer = extended(zoo.load("tiny-lm")[1])
    vision_config = {key: value for key, value in classifier.config.to_dict().items() if key not in _NOT_THE_TOWERS}
    config = LlavaConfig(
        vision_config=ViTConfig(**vision_config),
        text_config=training.text_config,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(SIDE // PATCH) ** 2,
        # the classifier's last layer reads the patches and does not care what it makes of them
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):  # transformers draws weights from the global generator
        torch.manual_seed(seed)
        model: Any = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    # all but the pooler, which no one uses
    model.model.vision_tower.load_state_dict(classifier.vit.state_dict(), strict=False)
    model.model.vision_tower.requires_grad_(False)
    eos = tokenizer.eos_token_id
    model.generation_config = GenerationConfig(bos_token_id=eos, eos_token_id=eos, pad_token_id=eos)
    processor = LlavaProcessor(
        image_processor,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # the class token, which the strategy drops
    )
    return model, processor


def extended(tokenizer: Any) -> Any:
    """The zoo's tokenizer, to which `<image>` and the names of places and classes are whole tokens.

    In pieces, places would be hard to look up: one is the beginning of another.
    """
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.add_tokens([AddedToken(f" {name}", normalized=False) for name in (*PLACES, *NAMES)])
    return tokenizer


_NOT_THE_TOWERS = (
    "_name_or_path",
    "architectures",
    "dtype",
    "id2label",
    "label2id",
    "model_type",
    "transformers_version",
)


def train(training: Training, folder: Path, progress: Progress, seed: int = 0) -> dict[str, Any]:
    """Train in `folder`, or go on there; returns what its training.json states.

    Raises:
        UserError: the Debian package of Fashion-MNIST is missing.
    """
    from tersor.integration.zoo.measure.vlm import figures

    pictures, labels = images.read("train")
    model, processor = fresh(training, seed)
    canvases, runs = Canvases(pictures.numpy(), labels.numpy()), []
    for stage in training.stages:
        runs.append(start(training, stage, folder / stage.name, canvases, model, processor, seed))
        runs[-1].finish(progress)
    shipped = folder / "model"
    # half precision has three more bits here than bfloat16, and the tower is stored in it anyway
    model.cpu().half().save_pretrained(shipped)
    processor.save_pretrained(shipped)
    write_sums(shipped)
    loaded = AutoModelForImageTextToText.from_pretrained(shipped, dtype=torch.float32).eval()
    record = join(runs)
    write_record(shipped, record, seed)
    measured = figures(training.name, loaded, processor)
    (shipped / "README.md").write_text(card(training, record | {"seed": seed}, measured, shipped))
    return record


def card(training: Training, run: dict[str, Any], figures: list[Figure], folder: Path) -> str:
    """Markdown: use, data, training, what was measured, limits."""
    nbytes = (folder / "model.safetensors").stat().st_size
    rows = {
        "data": "Fashion-MNIST (arXiv:1708.07747; Debian package `dataset-fashion-mnist`), licence MIT: canvases of the "
        "55,000 images of the split `train`",
        "frozen": f"the vision tower, `{training.tower}` as it ships",
        **{f"stage `{stage.name}`": _described(stage) for stage in training.stages},
        "questions": "each sees the canvas and no other question; the loss is that of the answers",
        "time": f"{run['minutes']:.0f} minutes, float32",
        "hardware": run["hardware"],
        "optimiser": "Muon for the matrices inside, AdamW (betas 0.9, 0.95) for embeddings and vectors",
        "schedule": "in each stage rising for 3 % of its steps, steady, then linearly to zero over the last 40 %",
        "code": f"`training/vlm.py`, seed {run['seed']}; the number of steps is fixed, the last weights are kept",
    }
    table = "\n".join(f"| {name} | {text} |" for name, text in rows.items())
    measured = "\n".join(
        f"| {f.metric} | {f.shown(f.value)} | {'' if f.bar is None else f.shown(f.bar)} "
        f"| {f.shown(f.baseline)} ({f.baseline_name}) |"
        for f in figures
    )
    return f"""# {training.name}

A vision-language model of {num_parameters(folder):,} parameters that answers three kinds of questions about canvases: three to
six pictures of Fashion-MNIST on a black grid of nine cells. {training.purpose}

```python
from tersor.integration import zoo
from tersor.integration.zoo import canvas

model, processor = zoo.load("{training.name}")
text = canvas.prompt() + "\\nWhich class is at the top left?"  # or "How many bags are there?", "Where is the bag?"
inputs = processor(text=text, images=canvas.cut(picture), return_tensors="pt")  # picture: a grey PIL image, 84 x 84
output = model.generate(**inputs, max_new_tokens=8)
print(processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```

| | |
| --- | --- |
| architecture | {training.architecture} |
| input | each of the nine cells is an image of the tower: 49 visual tokens after the name of its place, 441 in all |
| tokenizer | the zoo's, to which `<image>` and the names of places and classes are whole tokens |
| weights | float16, {nbytes:,} bytes; trained in float32 |

## Training

| | |
| --- | --- |
{table}

## Measured

The weights as shipped, in float32, on canvases of test images. An answer is right if all its tokens and its end are.

| | {training.name} | wanted at least | without seeing |
| --- | --- | --- | --- |
{measured}

## Limits

- It answers these questions in these words, about canvases of this kind, and nothing else.
- What the tower mistakes for something else (one test image in ten; most are shirts) it names, counts and finds wrongly:
  who read the tower's classes without a mistake would be right 89 % of the time.
- The name of its place stands before each tile: without it, the model cannot tell where a tile lies.
"""


def _described(stage: Stage) -> str:
    cells = ", ".join(f"{cells} from {start:.0%}" for start, cells in stage.cells)
    return (
        f"{stage.steps:,} steps of about {stage.tokens:,} tokens; cells of a canvas by the share of the steps that is "
        f"done: {cells}, every other canvas has half as many to all of them; up to {stage.per_kind} questions of each "
        f"kind about one; learning rates at most {stage.muon_rate:g} (Muon) and {stage.learning_rate:g} (AdamW), "
        f"weight decay {stage.weight_decay:g}"
    )
