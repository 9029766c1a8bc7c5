"""Choosing kernel, bandwidth or sharpness, and ridge, by small fits scored on the same held-out rows."""
