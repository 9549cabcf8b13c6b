"""What a pair of programs is, a model and its guide: records of their runs, rows, parameters, checks."""
