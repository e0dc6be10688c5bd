"""The wire format: `trunk.proto` and the code generated from it."""
