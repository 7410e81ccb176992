"""MU-SOTA workbook: train it, train its dense twin, compare, and say what holds it back."""
