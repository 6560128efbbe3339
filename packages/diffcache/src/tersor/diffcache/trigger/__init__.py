"""Triggers: which steps are computed."""

from tersor.diffcache.trigger.interval import Interval

__all__ = ["Interval"]
