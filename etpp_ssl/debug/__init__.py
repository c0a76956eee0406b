"""Dumps of steps that were not finite, and their reproduction."""
