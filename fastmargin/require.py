"""The check that all options share. No torch here: the command line uses it before anything is loaded."""


def require(ok: bool, name: str, given: object, want: str) -> None:
    """Raises ValueError unless ok, with the option's name, the value given and the one wanted."""
    if not ok:
        raise ValueError(f"{name} is {given!r}; want {want}")
