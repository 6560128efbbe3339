"""The tokenizer within a GGUF file: byte-level BPE ("gpt2" there), or BPE that falls back on bytes ("llama")."""

import json
from typing import Any, NamedTuple

from tersor.quant.export.layers import Unexportable

# what text is cut into before merging: the pattern, and llama.cpp's name for it
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_PATTERNS = {_WORDS + r"\p{N}{1,3}" + _REST: "llama-bpe", _WORDS + r"\p{N}" + _REST: "qwen2"}

# gguf.TokenType
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)


class Vocabulary(NamedTuple):
    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str]  # of "gpt2"
    scores: list[float]  # of "llama": the higher, the sooner two pieces are merged into this token
    special: dict[str, int]  # "bos", "eos", "unk", "pad" -> token id
    add_bos: bool
    add_eos: bool
    add_space_prefix: bool
    chat_template: str | None


def vocabulary(tokenizer: Any, vocab_size: int) -> Vocabulary:
    """What is stored of a fast tokenizer: `vocab_size` tokens, as many as the embedding has; others could not be looked up.

    Raises:
        Unexportable: it is no BPE that llama.cpp knows, or not that of the model.
    """
    whole = json.loads(tokenizer.backend_tokenizer.to_str())
    model, steps = whole["model"], _steps(whole["pre_tokenizer"])
    if model["type"] != "BPE":
        raise Unexportable(f"GGUF export knows tokenizers of type BPE, not {model['type']}; export without tokenizer")
    by_bytes = any(step["type"] == "ByteLevel" for step in steps)
    pre = _pre(steps, model.get("ignore_merges", False)) if by_bytes else "default"
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    if (size := len(model["vocab"])) > vocab_size:
        raise Unexportable(f"the tokenizer has {size} tokens, the model {vocab_size}: give the tokenizer of the model")
    tokens = [f"[PAD{i}]" for i in range(vocab_size)]
    types = [_UNUSED] * len(tokens)
    for token, i in model["vocab"].items():
        is_byte = not by_bytes and len(token) == 6 and token.startswith("<0x")
        tokens[i], types[i] = token, _BYTE if is_byte else _UNKNOWN if token == model["unk_token"] else _NORMAL
    for added in (added for added in whole["added_tokens"] if added["id"] < vocab_size):
        text = added["content"] if added["special"] else added["content"].replace("\u2581", " ")
        tokens[added["id"]], types[added["id"]] = text, _CONTROL if added["special"] else _USER_DEFINED
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        ranks.setdefault(left + right, rank)
    special = {kind: getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "unk", "pad")}
    ids = tokenizer("a").input_ids
    return Vocabulary(
        "gpt2" if by_bytes else "llama",
        pre,
        tokens,
        types,
        [" ".join(merge) for merge in merges] if by_bytes else [],
        [] if by_bytes else [-float(ranks.get(token, len(merges))) for token in tokens],
        {kind: i for kind, i in special.items() if i is not None and i < vocab_size},
        len(ids) > 1 and ids[0] == tokenizer.bos_token_id,
        len(ids) > 1 and ids[-1] == tokenizer.eos_token_id,
        _prepends_space(steps, _steps(whole["normalizer"], "normalizers")),
        tokenizer.chat_template,
    )


def write_vocabulary(writer: Any, found: Vocabulary | None) -> None:
    if found is None:
        # llama.cpp then takes token ids only
        writer.add_tokenizer_model("none")
        return
    writer.add_tokenizer_model(found.model)
    writer.add_tokenizer_pre(found.pre)
    writer.add_token_list(found.tokens)
    writer.add_token_types(found.types)
    if found.merges:
        writer.add_token_merges(found.merges)
    if found.scores:
        writer.add_token_scores(found.scores)
        writer.add_add_space_prefix(found.add_space_prefix)
    for kind, i in found.special.items():
        getattr(writer, f"add_{kind}_token_id")(i)
    writer.add_add_bos_token(found.add_bos)
    writer.add_add_eos_token(found.add_eos)
    if found.chat_template:
        writer.add_chat_template(found.chat_template)


def _steps(part: dict[str, Any] | None, inner: str = "pretokenizers") -> list[dict[str, Any]]:
    if part is None:
        return []
    return part[inner] if part["type"] == "Sequence" else [part]


def _pre(steps: list[dict[str, Any]], ignore_merges: bool) -> str:
    """llama.cpp's name for what is done before merging."""
    match steps:
        case [{"type": "ByteLevel", "use_regex": True}]:
            name = "gpt-2"
        case [{"type": "Digits", "individual_digits": True}, {"type": "ByteLevel", "use_regex": True}]:
            name = "smollm"
        case [{"type": "Split", "pattern": {"Regex": pattern}}, {"type": "ByteLevel", "use_regex": False}]:
            name = _PATTERNS.get(pattern)
        case _:
            name = None
    if name is None or ignore_merges != (name == "llama-bpe"):
        raise Unexportable(
            f"llama.cpp has no name that we know for the way in which the tokenizer cuts text into words: {steps}; "
            f"export without tokenizer"
        )
    return name


def _prepends_space(steps: list[dict[str, Any]], normalizers: list[dict[str, Any]]) -> bool:
    metaspaces = [step["prepend_scheme"] for step in steps if step["type"] == "Metaspace"]
    return any(scheme != "never" for scheme in metaspaces) or any(n["type"] == "Prepend" for n in normalizers)
