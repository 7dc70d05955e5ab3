"""What a study is and where it is stored: no Ray, no torch, no pandas."""
