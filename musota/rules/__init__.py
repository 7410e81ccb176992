"""Numbers in, findings out. Imports nothing but errors."""
