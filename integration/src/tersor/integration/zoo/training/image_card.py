"""The model card of an image classifier, with the figures of the run that made it."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tersor.integration.zoo.training.images import Training


def card(training: "Training", figures: dict[str, Any]) -> str:
    """Markdown: use, data, training, what was measured, limits."""
    optimiser = f"AdamW (learning rate {training.learning_rate:g}, betas {training.betas})"
    if training.muon_rate is not None:
        optimiser = f"Muon (learning rate {training.muon_rate:g}) for the matrices inside, {optimiser} for all else"
    rows = {
        "data": f"Fashion-MNIST (arXiv:1708.07747; Debian package `dataset-fashion-mnist`), licence MIT: the "
        f"{figures['images']:,} images of the split `train`",
        "augmentation": f"moved by up to {training.shift} pixels; {training.mirrored:.0%} mirrored",
        "steps": f"{figures['steps']:,} of {training.batch_size} images: {training.epochs} epochs",
        "time": f"{figures['minutes']:.0f} minutes, float32",
        "hardware": figures["hardware"],
        "optimiser": f"{optimiser}; weight decay {training.weight_decay}",
        "schedule": f"rising for {training.warmup:.0%} of the steps, then to zero on a cosine",
        "loss": f"cross-entropy, label smoothing {training.label_smoothing}",
        "code": f"`training/images.py`, seed {figures['seed']}; the number of epochs is fixed, the last weights are kept",
    }
    table = "\n".join(f"| {name} | {text} |" for name, text in rows.items())
    return f"""# {training.name}

An image classifier of {figures["parameters"]:,} parameters for Fashion-MNIST: grey pictures of ten kinds of clothing.
{training.purpose}

```python
from tersor.integration import zoo

model, processor = zoo.load("{training.name}")
logits = model(**processor(images, return_tensors="pt")).logits  # images: grey PIL images, 28 x 28, white on black
```

| | |
| --- | --- |
| architecture | {training.architecture} |
| weights | float16, {figures["nbytes"]:,} bytes; trained in float32 |
| input | (batch, 1, 28, 28), from 0 for black to 1 for white, then normalised; the processor does both |

## Training

| | |
| --- | --- |
{table}

## Measured

The weights as shipped, in float32, on the 10,000 test images.

| | test accuracy |
| --- | --- |
| {training.name} | {figures["accuracy"]:.2%} |
| wanted at least | {training.bar:.0%} |
| nearest class mean, in pixels | {figures["nearest_mean"]:.2%} |
| always the same class | 10.00% |

## Limits

- It knows ten kinds of clothing, each alone, centred and white on black; anything else it calls one of them,
  and with confidence.
- T-shirts, pullovers, coats and shirts are what it mistakes for one another.
- It is a test object, for compression and for measuring generated pictures, and of no use in a shop.
"""
