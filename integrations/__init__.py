"""Integrations of softhooks with other frameworks, one flat module each.

Import them as ``softhooks.integrations.<framework>``: the build maps this directory to that package, and from the
repository's root ``integrations.<framework>`` would load every module a second time. A framework is imported only
when its integration is used, so importing a module here costs nothing and needs nothing.
"""
