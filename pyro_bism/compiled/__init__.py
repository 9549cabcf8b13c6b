"""A step as graphs of tensor operations, captured and compiled."""
