"""Comparing methods: what is run, what was measured, and what the figures say."""
