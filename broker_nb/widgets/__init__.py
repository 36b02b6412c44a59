"""The live view: a model on the loop thread, and a thin widget that shows it."""
