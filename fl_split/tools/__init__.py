"""Verbs of the command line that belong to nobody's round."""
