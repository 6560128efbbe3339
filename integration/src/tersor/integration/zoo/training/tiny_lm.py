"""Trains `tiny-lm`: a 6 M parameter Llama on the corpus, in an hour on two cores.

    python -m tersor.integration.zoo.training.corpus RUN/corpus
    python -m tersor.integration.zoo.training.tiny_lm RUN --minutes 60

Writes RUN/model (what ships) and RUN/checkpoint.pt (to go on after a stop: run the same command again).
The learning rate follows the clock, so that a slower machine trains fewer steps and still ends annealed.
"""

import argparse
import gzip
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tersor.integration.zoo.training.corpus import SOURCES
from tersor.integration.zoo.training.muon import Muon

VOCAB_SIZE = 4096
END = "<|endoftext|>"  # between documents; also the tokenizer's BOS
CONFIG = LlamaConfig(
    vocab_size=VOCAB_SIZE,
    hidden_size=256,
    intermediate_size=768,
    num_hidden_layers=6,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    max_position_embeddings=1024,
    rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    tie_word_embeddings=True,
    bos_token_id=0,
    eos_token_id=0,
)


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE; digits stand alone, so that numbers have one spelling."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB_SIZE, special_tokens=[END], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END, model_max_length=1024)


class Batches:
    """Random windows of the training tokens, each source with its weight."""

    def __init__(self, documents: list[dict[str, str]], tokenizer: Any, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self.streams, self.held_out = [], {}
        for source in SOURCES:
            mine = [d for d in documents if d["source"] == source.package]
            self.streams.append(_encode([d["text"] for d in mine if d["split"] == "train"], tokenizer))
            validation = [d["text"] for d in mine if d["split"] == "validation"]
            if validation:
                self.held_out[source.package] = (
                    _encode(validation, tokenizer),
                    sum(len(t.encode()) for t in validation),
                )
        self.weights = [source.weight for source in SOURCES]

    def next(self, batch_size: int, seq_len: int) -> Tensor:
        """Token ids, (batch_size, seq_len + 1)."""
        rows = []
        for stream in self.random.choice(len(self.streams), batch_size, p=self.weights):
            tokens = self.streams[stream]
            start = self.random.integers(len(tokens) - seq_len - 1)
            rows.append(tokens[start : start + seq_len + 1])
        return torch.from_numpy(np.stack(rows).astype(np.int64))


def _encode(texts: list[str], tokenizer: Any) -> np.ndarray:
    ids = [[0, *encoding.ids] for encoding in tokenizer.backend_tokenizer.encode_batch(texts)]
    return np.concatenate([np.array(i, np.uint16) for i in ids])


def loss_of(model: torch.nn.Module, tokens: Tensor) -> Tensor:
    """Mean next-token loss of `tokens` (batch, seq + 1), in nats."""
    logits = model(tokens[:, :-1]).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


@torch.inference_mode()
def evaluate(model: torch.nn.Module, batches: Batches, windows: int = 16, seq_len: int = 512) -> dict[str, float]:
    """Perplexity per token of each source's validation documents."""
    found = {}
    for source, (tokens, _) in batches.held_out.items():
        starts = np.linspace(0, len(tokens) - seq_len - 2, windows).astype(int)
        rows = torch.from_numpy(np.stack([tokens[s : s + seq_len + 1] for s in starts]).astype(np.int64))
        found[source] = math.exp(torch.stack([loss_of(model, row[None]) for row in rows]).mean())
    return found


def train(run: Path, minutes: float, batch_size: int, seed: int) -> None:
    torch.manual_seed(seed)
    with gzip.open(run / "corpus/corpus.jsonl.gz", "rt") as file:
        documents = [json.loads(line) for line in file]
    tokenizer = _tokenizer(run, documents)
    batches = Batches(documents, tokenizer, seed)
    model = LlamaForCausalLM(CONFIG)
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    optimizers = [
        Muon(matrices, lr=6e-3, weight_decay=0.01),
        torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    rates = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
    step = spent = seen = 0
    checkpoint = run / "checkpoint.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        for optimizer, state in zip(optimizers, saved["optimizers"]):
            optimizer.load_state_dict(state)
        step, spent, seen = saved["step"], saved["spent"], saved["seen"]
        batches.random = np.random.default_rng([seed, step])
    before, started, last_save = spent, time.monotonic(), time.monotonic()
    while (done := spent / (60 * minutes)) < 1:
        # steady, then linearly to zero over the last 40 %; longer windows when the short ones are learnt
        rate = min(1.0, (step + 1) / 60, (1 - done) / 0.4)
        seq_len = 256 if done < 0.5 else 512 if done < 0.95 else 1024
        for group, full in zip([g for o in optimizers for g in o.param_groups], rates):
            group["lr"] = full * rate
        tokens = batches.next(batch_size * 256 // seq_len, seq_len)
        loss = loss_of(model, tokens)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        step, seen, spent = step + 1, seen + tokens[:, 1:].numel(), before + time.monotonic() - started
        if step % 50 == 0:
            print(
                f"step {step} tokens {seen:,} minutes {spent / 60:.1f} loss {loss.item():.3f} rate {rate:.2f}",
                flush=True,
            )
        if time.monotonic() - last_save > 300:
            _save(run, model, optimizers, step, spent, seen)
            print(f"step {step} validation perplexity {evaluate(model, batches)}", flush=True)
            last_save = time.monotonic()
    _save(run, model, optimizers, step, spent, seen)
    model.bfloat16().save_pretrained(run / "model")
    tokenizer.save_pretrained(run / "model")
    found = evaluate(model.float(), batches, windows=48)
    print(json.dumps({"steps": step, "tokens": seen, "minutes": spent / 60, "validation_perplexity": found}))


def _tokenizer(run: Path, documents: list[dict[str, str]]) -> Any:
    if not (run / "tokenizer").exists():
        texts = [d["text"] for d in documents if d["split"] == "train"]
        train_tokenizer(texts).save_pretrained(run / "tokenizer")
    return PreTrainedTokenizerFast.from_pretrained(run / "tokenizer")


def _save(run: Path, model: Any, optimizers: list[Any], step: int, spent: float, seen: int) -> None:
    state = {
        "model": model.state_dict(),
        "optimizers": [o.state_dict() for o in optimizers],
        "step": step,
        "spent": spent,
        "seen": seen,
    }
    torch.save(state, run / "checkpoint.new")
    (run / "checkpoint.new").replace(run / "checkpoint.pt")
    # weights in the middle of training, in the shape that ships
    model.save_pretrained(run / "latest")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--batch-size", type=int, default=8, help="windows of 256 tokens per step")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    train(arguments.run, arguments.minutes, arguments.batch_size, arguments.seed)


if __name__ == "__main__":
    main()
