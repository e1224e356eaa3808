"""Integrations of softhooks with other frameworks, one module each.

Import them as ``softhooks.integrations.<framework>``: the build maps this directory to that package. From the repository's root,
``integrations.<framework>`` would load every module a second time. A framework is only imported when its integration is used, so
importing a module here is cheap and works without the framework.
"""

from softhooks.integration_support import register

register("trl", "softhooks.integrations.trl")
