"""The one exception of this package, and the words of others in its sentences."""

__all__ = ["DataError", "one_line"]


class DataError(ValueError):
    """Data that cannot be used. The message is one sentence that names the file and the reason."""


def one_line(error: BaseException) -> str:
    """What another library's error says, or its name."""
    return " ".join(str(error).split()) or type(error).__name__
