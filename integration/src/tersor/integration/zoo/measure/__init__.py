"""What each model of the zoo can do, beside what it should and what is reached without learning."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Figure:
    """One number of a model.

    Args:
        metric: what was measured, in words.
        value: what the model reaches; shares are from 0 to 1.
        baseline: what is reached without learning, and `baseline_name` how.
        bar: what it should reach at least; None where nothing was set.
        is_share: shown in per cent.
    """

    metric: str
    value: float
    baseline: float
    baseline_name: str
    bar: float | None = None
    is_share: bool = True

    def shown(self, value: float) -> str:
        """`value` as a table shows it.

        >>> Figure("accuracy", 0.91494, 0.1, "always the same").shown(0.91494)
        '91.49 %'
        """
        return f"{100 * value:.2f} %" if self.is_share else f"{value:.2f}"
