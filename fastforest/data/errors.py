"""The one exception of this package."""

__all__ = ["DataError"]


class DataError(ValueError):
    """Data that cannot be used. The message is one sentence that names the file and the reason."""
