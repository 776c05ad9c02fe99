"""How strong the penalty should be: one drift, or one λ, for many problems."""
