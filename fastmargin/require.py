"""The one form of a refusal. No torch here: the command line needs it before anything is loaded."""


def require(ok: bool, name: str, given: object, want: str) -> None:
    """Raises ValueError naming the option, what was given and what is wanted."""
    if not ok:
        raise ValueError(f"{name} is {given!r}; want {want}")
