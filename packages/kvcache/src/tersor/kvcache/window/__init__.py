"""Which of the newest tokens are kept as they are."""

from tersor.kvcache.window.recent import FlushedWindow, RecentWindow

__all__ = ["FlushedWindow", "RecentWindow"]
