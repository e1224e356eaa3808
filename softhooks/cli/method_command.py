"""A command that also takes the options of the methods and of the callback, as `softhooks run` does."""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand

from softhooks.cli import run_parser
from softhooks.cli.exit_codes import usage_errors
from softhooks.cli.options import methods

METHOD_OPTIONS = "softhooks.method_options"
"""The key in `context.meta` of the options that were given for the method and the callback."""


class MethodCommand(TyperCommand):
    """Takes the options of methods out of the command line before the command's own options are parsed."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the command line; the options of methods are put into `context.meta`."""
        if "--help" in args:  # reading the options of all methods takes longer than showing the help
            return self._parse(ctx, ["--help"])
        with usage_errors():
            ctx.meta[METHOD_OPTIONS], own = run_parser.method_options_in(args)
        return self._parse(ctx, own)

    def _parse(self, ctx: Any, args: list[str]) -> list[str]:
        parsed: list[str] = super().parse_args(ctx, args)
        return parsed


def method_names() -> list[str]:
    """Return the names of the methods for shell completion."""
    return [kind.replace("_", "-") for kind in methods()]
