"""The trunk service and the node's client for it."""
