"""A trained model as a folder: export, predict, explain, retrain, card."""
