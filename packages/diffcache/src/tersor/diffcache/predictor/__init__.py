"""Predictors: weights of the stored features, from their times alone."""

from tersor.diffcache.predictor.reuse import Reuse

__all__ = ["Reuse"]
