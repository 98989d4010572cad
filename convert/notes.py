"""Notes: what the user should know and need not act on."""

import sys


def tell(text: str) -> None:
    """Shows a note on the error stream."""
    print(f"note: {text}", file=sys.stderr)
