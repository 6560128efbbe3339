"""Published decoders, as a choice of pieces."""

from tersor.decoding.controller import FixedLength as _FixedLength
from tersor.decoding.drafter import ModelDrafter as _ModelDrafter
from tersor.decoding.drafter import NgramDrafter as _NgramDrafter
from tersor.decoding.recipe import Recipe as _Recipe

__all__ = ["greedy", "prompt_lookup", "speculative_decoding"]


def greedy() -> _Recipe:
    """Autoregressive (https://huggingface.co/docs/transformers/generation_strategies): one token per pass, no drafts.

    The baseline that the others are compared with; follows `do_sample` as they do.
    """
    return _Recipe()


def prompt_lookup(num_draft: int = 10, max_ngram: int = 3) -> _Recipe:
    """Prompt lookup decoding (https://github.com/apoorvumang/prompt-lookup-decoding): drafts copied from the text.

    Pays where the answer repeats its prompt or itself: editing, summaries, code, retrieval. `NgramDrafter` says where
    it differs from the original.

    Args:
        num_draft: tokens copied per draft.
        max_ngram: longest suffix that is looked up.
    """
    return _Recipe(drafter=_NgramDrafter(max_ngram), controller=_FixedLength(num_draft))


def speculative_decoding(num_draft: int = 5) -> _Recipe:
    """Speculative decoding (arXiv:2211.17192): a smaller model drafts, greedily, and the target checks.

    The model is handed in beside the recipe: `speculate(model, inputs, recipe, draft_model=small)`, likewise with
    `generate`. It must speak the same tokens. `ModelDrafter` says where it differs from the paper.

    Args:
        num_draft: tokens per draft (the paper's gamma).
    """
    return _Recipe(drafter=_ModelDrafter(), controller=_FixedLength(num_draft))
