"""The end of a choice between models: the test set, read once, and the report."""
