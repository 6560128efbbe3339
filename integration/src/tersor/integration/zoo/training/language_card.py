"""The model card of a language model, with the figures of the run that made it."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tersor.integration.zoo.measure import Figure
from tersor.integration.zoo.training.corpus import SOURCES
from tersor.integration.zoo.training.run import num_parameters

if TYPE_CHECKING:
    from tersor.integration.zoo.training.language import Stage, Training


def card(training: "Training", run: dict[str, Any], figures: list[Figure], folder: Path) -> str:
    """Markdown: use, data, training, what was measured, limits."""
    nbytes = (folder / "model.safetensors").stat().st_size
    stages = "\n".join(f"| stage `{stage.name}` | {_described(stage, training)} |" for stage in training.stages)
    sources = "\n".join(f"| {source.package} | {source.licence} | {source.weight:.0%} |" for source in SOURCES)
    measured = "\n".join(
        f"| {f.metric} | {f.shown(f.value)} | {f.shown(f.baseline)} ({f.baseline_name}) |" for f in figures
    )
    return f"""# {training.name}

A causal language model of {num_parameters(folder):,} parameters for English prose and Python, and of no use for writing.
{training.purpose}

```python
from tersor.integration import zoo

model, tokenizer = zoo.load("{training.name}")
```

| | |
| --- | --- |
| architecture | {training.architecture}, RoPE, 1024 positions |
| tokenizer | byte-level BPE, 4096 tokens, the same for all of the zoo; `<|endoftext|>` is BOS and EOS |
| weights | bfloat16, {nbytes:,} bytes; trained in float32 |

## Training

| | |
| --- | --- |
{stages}
| optimiser | Muon for the matrices inside, AdamW (betas 0.9, 0.95) for embeddings and vectors |
| schedule | rising for 3 % of a stage, steady, then linearly to zero over the last 40 % |
| steps | {run["steps"]:,} |
| time | {run["minutes"]:.0f} minutes |
| hardware | {run["hardware"]} |
| code | `training/language.py`, seed {run["seed"]} |

| Debian package | licence | share of the text |
| --- | --- | --- |
{sources}

## Measured

The weights as shipped, in float32; windows of 512 tokens.

| | {training.name} | without learning |
| --- | --- | --- |
{measured}

## Limits

- It knows no facts and follows no instructions. Its prose is of 1800 and of software manuals, its code is Python.
- The held-out documents are of the same works as the training documents, so perplexities flatter it.
- Claims that need a capable model need another one.
"""


def _described(stage: "Stage", training: "Training") -> str:
    goal = f"the distribution of `{training.teacher}`" if training.teacher else "the next token"
    parts = [f"{stage.steps:,} steps; {stage.text_tokens:,} tokens of text, learning {goal}"]
    if stage.recall_tokens:
        parts.append(f"and about {stage.recall_tokens:,} of recall prompts (`recall.py`), learning their answers")
    lengths = ", ".join(str(length) for _, length in stage.seq_len)
    rates = f"learning rates {stage.muon_rate:g} (Muon) and {stage.learning_rate:g}"
    return f"{' '.join(parts)}; windows up to {lengths}; {rates}"
