"""Experiments on models: numbers out."""
