"""The data for training: from a table of volumes to checked rows, prepared cohorts and batches."""
