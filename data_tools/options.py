"""Options of commands whose values cannot be."""


class BadOption(ValueError):
    """An option of an impossible value; says which, what was found and what was expected. Exit status 2."""
