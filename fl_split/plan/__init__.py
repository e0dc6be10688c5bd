"""What a run will cost, from its configuration alone."""
