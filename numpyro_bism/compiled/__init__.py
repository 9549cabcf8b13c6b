"""A step as one compiled program: its noise drawn ahead, its convolutions fast in a loop."""
