"""What a run did: counted, pass by pass."""

from dataclasses import dataclass
from typing import NamedTuple


class Pass(NamedTuple):
    """One forward of the target model: `proposed` drafted tokens went in, `accepted` of them came out for free."""

    proposed: int
    accepted: int


@dataclass(frozen=True)
class Stats:
    """Counts of one run; `tokens == target_passes + accepted` always.

    Counted in positions: in a batch, whose rows move together, one position is one token of each row.

    Args:
        passes: every forward of the target in order; the first is the prompt's, which drafts nothing.
    """

    passes: tuple[Pass, ...]

    @property
    def target_passes(self) -> int:
        return len(self.passes)

    @property
    def proposed(self) -> int:
        """Drafted tokens that the target checked."""
        return sum(p.proposed for p in self.passes)

    @property
    def accepted(self) -> int:
        """Tokens beyond the one that each pass gives anyway: the passes saved against plain decoding."""
        return sum(p.accepted for p in self.passes)

    @property
    def tokens(self) -> int:
        """New tokens."""
        return self.target_passes + self.accepted

    @property
    def acceptance_rate(self) -> float:
        """Accepted fraction of the proposed tokens, 0 when nothing was proposed."""
        return self.accepted / self.proposed if self.proposed else 0.0

    @property
    def mean_accepted(self) -> float:
        """Accepted tokens per draft, 0 when nothing was drafted."""
        drafts = sum(p.proposed > 0 for p in self.passes)
        return self.accepted / drafts if drafts else 0.0

    @property
    def tokens_per_pass(self) -> float:
        """1.0 is plain decoding. Counts the prompt's pass."""
        return self.tokens / self.target_passes

    def __str__(self) -> str:
        return (
            f"{self.tokens} tokens in {self.target_passes} passes ({self.tokens_per_pass:.2f} per pass), "
            f"{self.accepted} of {self.proposed} drafted tokens accepted"
        )
