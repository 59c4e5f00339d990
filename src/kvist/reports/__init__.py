"""Figures before and after: what a model is, what its cache costs, how well a setting does."""
