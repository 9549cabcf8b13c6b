"""What BiSM and its rivals share while they train."""
