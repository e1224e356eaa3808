"""Integrations of softhooks with other frameworks, one module each.

Import them as ``softhooks.integrations.<framework>``. If Python runs in the root of the repository,
``integrations.<framework>`` also works, but loads each module a second time. Importing an integration does not import its
framework.
"""

from softhooks.integration_support import register

register("trl", "softhooks.integrations.trl")
