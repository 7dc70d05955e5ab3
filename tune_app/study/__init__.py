"""A study's specification and storage: no Ray, no torch, no pandas."""
