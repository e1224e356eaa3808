"""Plot a prompt with matplotlib: the norm of each virtual token, and the similarities between them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from softhooks.errors import SoftHooksError
from softhooks.runtime.slot_statistics import similarities, table_norms

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_tables(tables: Mapping[str, Tensor], title: str) -> Figure:
    """Draw two plots for each tensor of a prompt, [P, N]: the norms of its rows, and their cosine similarities.

    Raises:
        SoftHooksError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise SoftHooksError(
            "`plot` needs matplotlib, which is not installed.", 'Install it: pip install "softhooks[plot]".'
        ) from error
    figure = Figure(figsize=(8, 3.2 * len(tables)), layout="constrained")  # a Figure of its own needs no display
    figure.suptitle(title)
    axes = figure.subplots(len(tables), 2, squeeze=False)
    for (name, table), (left, right) in zip(tables.items(), axes, strict=True):
        norms = table_norms(table).cpu().numpy()
        left.bar(range(len(norms)), norms)
        left.set(xlabel="virtual token", ylabel="norm", title=name)
        image = right.imshow(similarities(table).cpu().numpy(), vmin=-1, vmax=1, cmap="RdBu")
        right.set(xlabel="virtual token", ylabel="virtual token", title="cosine similarity")
        figure.colorbar(image, ax=right)
    return figure
