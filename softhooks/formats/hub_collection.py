"""List the repositories of a collection on the Hub."""

from __future__ import annotations

from softhooks.errors import CheckpointError
from softhooks.formats.hub_errors import client_error, reason


def repositories_of(slug: str, token: str | bool | None = None) -> list[str]:
    """Return the names of the model repositories in a collection, in the order of the collection.

    Args:
        slug: the last part of the collection's address, such as `me/prompts-64f9a55bb3115b4f513ec026`.
        token: as in `huggingface_hub`.

    Raises:
        CheckpointError: there is no such collection, it contains no model, or it cannot be read.
    """
    from huggingface_hub import HfApi

    try:
        items = HfApi().get_collection(slug, token=token).items
    except (client_error(), OSError, ValueError, RuntimeError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"the collection {slug!r} cannot be read from the Hub.",
            "Check its name, which is the last part of its address, and the connection; a private collection needs a token.",
            hub=reason(error),
        ) from error
    found = [item.item_id for item in items if item.item_type == "model"]
    if not found:
        raise CheckpointError(f"the collection {slug!r} contains no models, so it contains no prompts.")
    return found
