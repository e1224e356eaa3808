"""Commands of integrations, with the exit codes and error messages of `softhooks`."""

from softhooks.cli.exit_codes import reported, usage

__all__ = ["reported", "usage"]
