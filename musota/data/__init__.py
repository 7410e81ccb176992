"""Texts, tokens, windows."""
