"""The search over fine-tuning runs, and all around it: command line, studies, results, reports."""
