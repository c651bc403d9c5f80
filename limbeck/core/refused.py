"""The one exception limbeck raises on purpose."""


class Refused(ValueError):
    """Bad input, said in one sentence: the thing, what was found, what was expected, the fix."""
