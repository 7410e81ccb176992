"""The training loop and the records of a run."""
