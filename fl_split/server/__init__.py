"""The Flower strategy, aggregation, run folder and report; nothing of a node or of its data."""
