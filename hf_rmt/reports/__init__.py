"""Frozen results: tables, files, pictures."""
