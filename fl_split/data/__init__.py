"""Private examples -> batches of tokens. Knows no party."""
