"""Exports in serving engines. Nothing else of the package imports this."""
