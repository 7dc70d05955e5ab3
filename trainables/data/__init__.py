"""What a network is trained on: from a table of volumes to checked rows, prepared cohorts and batches."""
