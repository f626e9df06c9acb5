"""Budgets of methods, measured on pictures."""
