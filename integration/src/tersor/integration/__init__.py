"""All of tersor wired together: plans, the catalogue, the main job and the command line."""

from tersor.integration.plan import Plan

__all__ = ["Plan"]
