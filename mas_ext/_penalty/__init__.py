"""The penalty on a model's parameters: its strength, and its place in an optimizer's step."""
