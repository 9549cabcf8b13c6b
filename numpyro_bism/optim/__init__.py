"""Optimisers as users pass them, and their own steps as differentiable functions."""
