"""Errors of the Hub's client, and how to quote them."""

from __future__ import annotations


def client_error() -> type[Exception]:
    """Return the error class of the HTTP client, which is httpx or httpx2, depending on the version of huggingface_hub."""
    from huggingface_hub.errors import HfHubHTTPError

    found: type[Exception] = next(kind for kind in HfHubHTTPError.__mro__ if kind.__name__ == "HTTPError")
    return found


def reason(error: BaseException) -> str:
    """Return the class and the text of an error, in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
