"""The regularization strength λ: one number, one per name pattern, or found from a drift."""
