"""What a user can mend: shown as one line, without a traceback."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake in what the user asked for; the message names it and says the way out."""


# libraries raise these for what they are given and for what they do not support
MENDABLE = (UserError, ImportError, NotImplementedError, OSError, ValueError)


def near_match(word: str, possibilities: Iterable[str]) -> str:
    """'; did you mean "x"?' or the list of what there is."""
    known = sorted(possibilities)
    close = difflib.get_close_matches(word, known, n=1)
    return f'; did you mean "{close[0]}"?' if close else f"; there are: {', '.join(known)}"
