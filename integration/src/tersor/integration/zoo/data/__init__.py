"""Real data that works offline: loaders that return `datasets.Dataset`, each from a package that is installed."""

from typing import TYPE_CHECKING

from tersor.integration.errors import UserError, near_match
from tersor.integration.zoo.data.fashion import fashion_mnist
from tersor.integration.zoo.data.handwriting import digits, mnist
from tersor.integration.zoo.data.photos import photographs
from tersor.integration.zoo.data.text import prose, source_code

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["digits", "fashion_mnist", "load", "mnist", "names", "photographs", "prose", "source_code"]
_LOADERS = {
    loader.__name__.replace("_", "-"): loader
    for loader in (digits, fashion_mnist, mnist, photographs, prose, source_code)
}


def names() -> list[str]:
    """Names of the data sets.

    >>> names()
    ['digits', 'fashion-mnist', 'mnist', 'photographs', 'prose', 'source-code']
    """
    return sorted(_LOADERS)


def load(name: str, split: str = "train") -> "Dataset":
    """The `split` ("train", "validation" or "test") of data set `name`.

    Raises:
        UserError: no such data set or split, or its package is missing; the message names what installs it.
    """
    if name not in _LOADERS:
        raise UserError(f"no data set {name!r}{near_match(name, names())}")
    return _LOADERS[name](split)
