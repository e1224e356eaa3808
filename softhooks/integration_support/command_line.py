"""Helpers for commands of integrations, with the exit codes and error messages of `softhooks`."""

from softhooks.cli.exit_codes import report_errors, usage_errors
