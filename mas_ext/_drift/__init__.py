"""How far the model has drifted from where its task began, and what keeps that within a budget."""
