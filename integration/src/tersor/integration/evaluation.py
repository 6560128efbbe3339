"""What a model is worth: perplexity, next tokens, bytes of its KV cache, speed. Measured, never estimated."""

import math
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tersor.integration.plan import Plan

Progress = Callable[[int, int, str], None]


def windows(tokenizer: Any, text: str, num_tokens: int, seq_len: int) -> Tensor:
    """The first `num_tokens` tokens of `text` as (windows, seq_len); each starts with the BOS token if there is one.

    Raises:
        ValueError: the text is too short for one window.
    """
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False).input_ids[:num_tokens])
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    body = seq_len - len(bos)
    count = len(ids) // body
    if count == 0:
        raise ValueError(f"the text has {len(ids)} tokens, fewer than one window of {body}; give a longer text")
    rows = ids[: count * body].view(count, body)
    return torch.cat([torch.tensor(bos).expand(count, -1), rows], 1).long()


@dataclass(frozen=True)
class Reading:
    """What a model makes of a text. `predicted` is its most likely next token at each position."""

    perplexity: float
    predicted: list[int]


@torch.inference_mode()
def read(
    model: Any, windows: Tensor, *, new_cache: Callable[[], Any] | None = None, progress: Progress | None = None
) -> Reading:
    """Perplexity exp(mean -log p(token | its window so far)) and the model's own next tokens.

    Args:
        windows: token ids, (windows, seq_len).
        new_cache: with it, each window is read in steps of 64 tokens through such a KV cache: tokens then attend to
            what the cache has stored, as in decoding. Without it, in one pass and without a cache.
    """
    total, predicted = 0.0, []
    step = 64 if new_cache else windows.shape[1]
    for index, window in enumerate(windows.to(model.device)):
        cache = new_cache() if new_cache else None
        for start in range(0, len(window) - 1, step):
            inputs, targets = window[start : start + step], window[start + 1 : start + 1 + step]
            logits = model(inputs[None], past_key_values=cache, use_cache=cache is not None).logits[0, : len(targets)]
            # slices: the float32 copy of 512 x 262144 logits would take half a gigabyte
            for part, target in zip(logits.split(64), targets.split(64)):
                total += torch.nn.functional.cross_entropy(part.float(), target, reduction="sum").item()
                predicted += part.argmax(-1).tolist()
        if progress:
            progress(index + 1, len(windows), "reading")
    return Reading(float(torch.tensor(total / len(predicted), dtype=torch.float64).exp()), predicted)


@dataclass(frozen=True)
class Comparison:
    """Two models on one text: perplexities, and what the second makes of the first's predictions.

    Args:
        divergence: KL(first || second), nats per token, mean over all positions.
        flips: share of positions where the likeliest next token is another.
    """

    perplexities: tuple[float, float]
    divergence: float
    flips: float


@torch.inference_mode()
def compare(original: Any, changed: Any, windows: Tensor, *, progress: Progress | None = None) -> Comparison:
    """What `changed` lost against `original` on `windows`, token ids (windows, seq_len)."""
    losses, divergence, flips, count = [0.0, 0.0], 0.0, 0, 0
    for index, window in enumerate(windows):
        both = [model(window[None].to(model.device), use_cache=False).logits[0, :-1] for model in (original, changed)]
        targets = window[1:].to(both[0].device)
        # slices: the float32 copy of 512 x 262144 logits would take half a gigabyte
        for *parts, target in zip(both[0].split(64), both[1].to(targets.device).split(64), targets.split(64)):
            first, second = (part.float().log_softmax(-1) for part in parts)
            for i, log_p in enumerate((first, second)):
                losses[i] -= log_p.gather(-1, target[:, None]).sum().item()
            divergence += torch.nn.functional.kl_div(second, first, reduction="sum", log_target=True).item()
            flips += int((first.argmax(-1) != second.argmax(-1)).sum())
        count += len(targets)
        if progress:
            progress(index + 1, len(windows), "comparing")
    perplexities = [math.exp(loss / count) for loss in losses]
    return Comparison((perplexities[0], perplexities[1]), divergence / count, flips / count)


@torch.inference_mode()
def kv_bytes_per_token(model: Any, window: Tensor, cache: Any) -> float:
    """Bytes that `cache` holds after reading `window` (seq,), per token."""
    model(window[None].to(model.device), past_key_values=cache, use_cache=True)
    return _cache_nbytes(cache) / len(window)


def _cache_nbytes(cache: Any) -> int:
    if hasattr(cache, "nbytes"):
        return cache.nbytes
    return sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values) if t is not None)


def forward_passes(model: Any, work: Callable[[], Any]) -> int:
    """How often `model` is called while `work` is done."""
    calls = []
    handle = model.register_forward_hook(lambda *_: calls.append(None))
    try:
        work()
    finally:
        handle.remove()
    return len(calls)


def peak_rss_bytes() -> int:
    """The largest resident memory that this process has had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB


def peak_gpu_bytes() -> int | None:
    """The most memory of the GPU that tensors of this process have taken; None without one."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None


@dataclass(frozen=True)
class Race:
    """Two runners on the same prompts, in turn; times are medians over the rounds."""

    tokens_per_second: list[float]
    prompt_latency_ms: list[float]
    texts: list[list[list[int]]]  # runner, prompt, new tokens


@torch.inference_mode()
def race(
    runners: list[tuple[Any, Plan]],
    prompts: list[Tensor],
    new_tokens: int,
    rounds: int = 3,
    progress: Progress | None = None,
) -> Race:
    """Greedy decoding speed of (model, plan) pairs, interleaved so that a drift of the machine hits all alike.

    Args:
        prompts: token ids, each (1, seq).
    """
    seconds = [[[] for _ in prompts] for _ in runners]
    latencies = [[[] for _ in prompts] for _ in runners]
    texts: list[list[list[int]]] = [[[] for _ in prompts] for _ in runners]
    for round in range(rounds + 1):  # the first warms up: kernels are compiled, pages are touched
        for p, prompt in enumerate(prompts):
            for r, (model, plan) in enumerate(runners):
                latency, _ = _timed(model, plan, prompt, 1)
                elapsed, tokens = _timed(model, plan, prompt, new_tokens)
                texts[r][p] = tokens
                if round > 0:
                    latencies[r][p].append(latency)
                    seconds[r][p].append(elapsed)
            if progress:
                progress(round * len(prompts) + p + 1, (rounds + 1) * len(prompts), "decoding in turn")
    speed = [sum(map(len, texts[r])) / sum(map(statistics.median, seconds[r])) for r in range(len(runners))]
    latency_ms = [1000 * statistics.mean(map(statistics.median, latencies[r])) for r in range(len(runners))]
    return Race(speed, latency_ms, texts)


def _timed(model: Any, plan: Plan, prompt: Tensor, new_tokens: int) -> tuple[float, list[int]]:
    start = time.perf_counter()
    output = plan.generate(model, prompt.to(model.device), new_tokens)
    tokens = output[0, prompt.shape[1] :].tolist()  # also waits for the device
    return time.perf_counter() - start, tokens
