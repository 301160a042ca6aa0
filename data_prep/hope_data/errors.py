"""The one exception of data preparation: `hope-data` prints its single line and exits 2; anything else is our bug and exits 1."""


class PrepError(Exception):
    """The user's to mend: one line with what was wrong, the value, the file or flag, and what to do."""
