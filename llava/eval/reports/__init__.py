"""Evaluated answer files as tables and pages."""
