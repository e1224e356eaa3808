"""Integrations of softhooks with other frameworks, one module each.

Import them as ``softhooks.integrations.<framework>``; ``integrations.<framework>``, which works in the root of the repository,
would load each module a second time. Importing an integration does not import its framework.
"""

from softhooks.integration_support import register

register("trl", "softhooks.integrations.trl")
