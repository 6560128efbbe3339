"""Finds the tower in a model by the names of its classes, so that no library is imported for it."""

from torch import nn

from tersor.tokencomp.errors import UnsupportedModel
from tersor.tokencomp.site import timm_vit, transformers_vit
from tersor.tokencomp.site.tower import Tower

SUPPORTED = (*timm_vit.SUPPORTED, *transformers_vit.SUPPORTED)


def find_tower(model: nn.Module) -> Tower:
    """The one tower in `model`.

    Raises:
        UnsupportedModel: there is none, or more than one.
    """
    found = {}
    for name, module in model.named_modules():
        # the class itself or a base: a user's subclass works as long as it leaves the layers alone
        classes = {f"{cls.__module__}.{cls.__qualname__}" for cls in type(module).__mro__}
        for site in (timm_vit, transformers_vit):
            tower = site.tower(module, classes)
            if tower is not None:
                found[name or type(model).__name__] = tower
    if len(found) > 1:
        raise UnsupportedModel(f"{type(model).__name__} has several towers ({', '.join(found)}); slim one of them")
    if not found:
        raise UnsupportedModel(f"{type(model).__name__} has no tower to slim; supported: {'; '.join(SUPPORTED)}")
    return next(iter(found.values()))
