"""`fl-split audit`: how much of a node's text the trunk's operator could read."""
