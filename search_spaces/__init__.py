"""What to try: the documented fixes as data, their ablations, and the named search spaces."""
