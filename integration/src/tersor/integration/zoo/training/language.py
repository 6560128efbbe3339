"""Trains the zoo's language models.

    python -m tersor.integration.zoo.training.corpus ~/.cache/tersor/corpus
    tersor zoo train tiny-lm

`tiny-lm` learns to write, to recall, then both; `tiny-draft` learns to predict what `tiny-lm` predicts; `tiny-moe`
learns to write. Writes RUN/model (what ships, with its card) and a checkpoint per stage: stopped and started again,
it goes on. Whatever is drawn depends on the seed and the step alone.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, PreTrainedConfig

from tersor.integration import zoo
from tersor.integration.zoo.measure.language import figures
from tersor.integration.zoo.recall import KINDS, Prompt, Recall
from tersor.integration.zoo.training.language_card import card
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

_SHARED = {
    "vocab_size": 4096,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 1024,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


@dataclass(frozen=True)
class Stage:
    """A part of a training, with learning rates that rise and fall once.

    Args:
        text_tokens: tokens of the corpus per step.
        recall_tokens: tokens of recall prompts per step, about.
        seq_len: tokens per window or longest prompt, from the share of the stage that is done.
        learning_rate: AdamW's at its highest, for embeddings and vectors.
        muon_rate: Muon's at its highest, for the other matrices.
    """

    name: str
    steps: int
    text_tokens: int
    recall_tokens: int
    seq_len: tuple[tuple[float, int], ...]
    learning_rate: float = 3e-3
    muon_rate: float = 6e-3
    weight_decay: float = 0.01

    def length(self, done: float) -> int:
        return next(length for start, length in reversed(self.seq_len) if done >= start)


@dataclass(frozen=True)
class Training:
    """A language model and how it is trained.

    Args:
        purpose: what it is for, a sentence for its card.
        architecture: the config in words.
        teacher: a model of the zoo whose next-token distribution is the target in place of the text.
    """

    name: str
    purpose: str
    architecture: str
    config: PreTrainedConfig
    stages: tuple[Stage, ...]
    teacher: str | None = None


WRITE = Stage("write", 1600, text_tokens=2048, recall_tokens=0, seq_len=((0.0, 256), (0.6, 512), (0.95, 1024)))
TINY_LM = Training(
    "tiny-lm",
    "Trained, so that quantisation, caches and drafters meet learnt structure, and small enough to ship.",
    "`LlamaForCausalLM`: 6 layers, width 256, 4 query and 2 key/value heads of 64, feed-forward 768, tied embeddings",
    LlamaConfig(hidden_size=256, intermediate_size=768, num_hidden_layers=6, **_SHARED),
    (
        WRITE,
        Stage(
            "recall",
            1800,
            text_tokens=1024,
            recall_tokens=1536,
            # words are not looked up at all before it has been learnt on short lists
            seq_len=((0.0, 24), (0.12, 48), (0.18, 96), (0.26, 192), (0.36, 384), (0.48, 640)),
            learning_rate=1.5e-3,
            muon_rate=4e-3,
        ),
        # while it learnt to look up, it forgot some of its words: perplexity 47 before, 72 after
        Stage(
            "both",
            1500,
            text_tokens=3072,
            recall_tokens=1024,
            seq_len=((0.0, 768),),
            learning_rate=2e-3,
            muon_rate=4e-3,
        ),
    ),
)
TINY_DRAFT = Training(
    "tiny-draft",
    "Drafts for `tiny-lm`, whose predictions it has learnt.",
    "`LlamaForCausalLM`: 1 layer, width 256, 4 query and 2 key/value heads of 64, feed-forward 768, tied embeddings",
    LlamaConfig(hidden_size=256, intermediate_size=768, num_hidden_layers=1, **_SHARED),
    (dataclasses.replace(WRITE, name="distil", steps=800, seq_len=((0.0, 256),)),),
    teacher="tiny-lm",
)
TINY_MOE = Training(
    "tiny-moe",
    "For methods on experts and routers.",
    "`MixtralForCausalLM`: 4 layers, width 192, 4 query and 2 key/value heads of 64, 8 experts of 256, 2 per token",
    MixtralConfig(
        hidden_size=192,
        intermediate_size=256,
        num_hidden_layers=4,
        num_local_experts=8,
        num_experts_per_tok=2,
        output_router_logits=False,
        router_aux_loss_coef=0.01,
        **_SHARED,
    ),
    (WRITE,),
)
TRAININGS = {training.name: training for training in (TINY_LM, TINY_DRAFT, TINY_MOE)}


def start(training: Training, stage: Stage, folder: Path, model: Any, text: Text, tokenizer: Any, seed: int) -> Run:
    """The run of one `stage` in `folder`, from `model` or from its checkpoint."""
    where = device()
    model = model.to(where).train()
    recall = Recall(tokenizer, np.concatenate(text.streams))
    teacher = zoo.load(training.teacher)[0].to(where) if training.teacher else None

    def loss(step: int) -> Tensor:
        random = np.random.default_rng([seed, step])
        length = stage.length(step / stage.steps)
        window = max(256, min(length, stage.text_tokens))
        tokens = text.windows(stage.text_tokens // window, window, random)
        total = text_loss(model, tokens.to(where), teacher)
        if stage.recall_tokens:
            prompts = _prompts(recall, stage.recall_tokens // length, length, random, [seed, step])
            total = total + answer_loss(model, prompts)
        return total

    tuned = optimizers(
        model,
        stage.learning_rate,
        weight_decay=stage.weight_decay,
        muon_rate=stage.muon_rate,
        outside=("embed",),
    )
    return Run(folder, f"{training}, {stage}, seed {seed}", model, tuned, stage.steps, loss, trapezoid)


def text_loss(model: Any, tokens: Tensor, teacher: Any = None) -> Tensor:
    """Mean next-token loss of `tokens` (batch, seq + 1), in nats; with a teacher, KL(teacher || model)."""
    if teacher is not None:
        with torch.no_grad():
            target = teacher(tokens[:, :-1]).logits.flatten(0, 1).log_softmax(-1)
        predicted = model(tokens[:, :-1]).logits.flatten(0, 1).log_softmax(-1)
        return F.kl_div(predicted, target, log_target=True, reduction="batchmean")
    # of a mixture of experts also the load-balancing loss (arXiv:2101.03961), weighted
    balance = getattr(model.config, "router_aux_loss_coef", 0.0)
    output = model(tokens[:, :-1], **({"output_router_logits": True} if balance else {}))
    loss = F.cross_entropy(output.logits.flatten(0, 1), tokens[:, 1:].flatten())
    return loss + balance * output.aux_loss if balance else loss


def answer_loss(model: Any, prompts: list[Prompt]) -> Tensor:
    """Mean loss of the answers of `prompts`, in nats."""
    where = model.device
    width = max(len(prompt.ids) for prompt in prompts)
    ids = torch.zeros(len(prompts), width, dtype=torch.long)  # what is after a prompt does not matter to it
    asked = torch.zeros(len(prompts), width, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt.ids)] = torch.tensor(prompt.ids)
        asked[row, prompt.answers] = True
    hidden = model.model(ids.to(where)).last_hidden_state
    logits = model.lm_head(hidden[:, :-1][asked[:, 1:].to(where)])
    return F.cross_entropy(logits, ids[asked].to(where))


def _prompts(recall: Recall, count: int, length: int, random: np.random.Generator, seed: list[int]) -> list[Prompt]:
    """`count` prompts of lengths up to `length`: were they all as long, a list would be copied by counting places."""
    found = []
    for number in range(max(1, count)):
        kind = KINDS[random.integers(len(KINDS))]
        tokens = int(random.integers(max(14, length // 4), length + 1))
        questions = max(1, tokens // 8 if kind == "records" else min(16, tokens // 32))
        found.append(recall.prompt(kind, tokens, [*seed, number], questions))
    return found


def train(training: Training, folder: Path, progress: Progress, seed: int = 0) -> dict[str, Any]:
    """Train in `folder`, or go on there; returns what its training.json states.

    Raises:
        UserError: the corpus has not been fetched.
    """
    tokenizer = zoo.load("tiny-lm")[1]
    text = Text(documents("train"), tokenizer)
    model = _fresh(training, seed)
    runs = []
    for stage in training.stages:
        run = start(training, stage, folder / stage.name, model, text, tokenizer, seed)
        run.finish(progress)
        runs.append(run)
    whole = join(runs)
    ship(training, model, tokenizer, folder / "model", whole, seed)
    return whole


def ship(training: Training, model: Any, tokenizer: Any, folder: Path, run: dict[str, Any], seed: int) -> None:
    """`model` in bfloat16 with its tokenizer, checksums and card, measured as it is stored."""
    model.cpu().bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_sums(folder)
    write_record(folder, run, seed)
    stored = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    (folder / "README.md").write_text(
        card(training, run | {"seed": seed}, figures(training.name, stored, tokenizer), folder)
    )


def _fresh(training: Training, seed: int) -> Any:
    """Random weights; but a student has its teacher's embeddings."""
    with torch.random.fork_rng(devices=[]):  # transformers draws weights from the global generator
        torch.manual_seed(seed)
        model: Any = AutoModelForCausalLM.from_config(training.config, dtype=torch.float32)
    if training.teacher:
        model.get_input_embeddings().load_state_dict(zoo.load(training.teacher)[0].get_input_embeddings().state_dict())
    return model
