"""Trains the test model: `python train.py` writes `weights.safetensors` beside it (a minute on one core).

A ViT of timm on scikit-learn's 8 x 8 digits, enlarged to 12 x 12 so that there are 36 patches and neighbours are alike.
The first 1297 of the shuffled images train it, the last 500 are held out: `held_out` is what the tests use.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.nn.functional import cross_entropy, interpolate

WEIGHTS = Path(__file__).parent / "weights.safetensors"
NUM_TRAIN = 1297


def new_model() -> VisionTransformer:
    return VisionTransformer(
        img_size=12, patch_size=2, in_chans=1, num_classes=10, embed_dim=48, depth=4, num_heads=4, mlp_ratio=2
    )


def trained_model() -> VisionTransformer:
    model = new_model()
    model.load_state_dict({name: tensor.float() for name, tensor in load_file(WEIGHTS).items()})
    return model.eval()


def digits() -> tuple[Tensor, Tensor]:
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images = interpolate(images, size=(12, 12), mode="bilinear")
    return images[order], torch.tensor(data.target)[order]


def held_out() -> tuple[Tensor, Tensor]:
    images, labels = digits()
    return images[NUM_TRAIN:], labels[NUM_TRAIN:]


def train(epochs: int = 30, batch_size: int = 64) -> VisionTransformer:
    torch.manual_seed(0)
    model = new_model()
    torch.nn.init.normal_(model.pos_embed, std=0.5)  # 0.02 takes several times as long to learn places
    images, labels = (x[:NUM_TRAIN] for x in digits())
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    steps = NUM_TRAIN // batch_size
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=epochs * steps)
    for _ in range(epochs):
        for batch in torch.randperm(NUM_TRAIN)[: steps * batch_size].split(batch_size):
            loss = cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


if __name__ == "__main__":
    model = train()
    save_file({name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}, WEIGHTS)
    images, labels = held_out()
    with torch.no_grad():
        print("held-out accuracy", (trained_model()(images).argmax(-1) == labels).float().mean().item())
