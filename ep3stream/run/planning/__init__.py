"""What a fit will take, told before it: formulas, and what a small fit measures."""
