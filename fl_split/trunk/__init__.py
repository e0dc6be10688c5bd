"""The trunk service, and nothing of a node."""
