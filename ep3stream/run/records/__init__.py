"""What a fit tells of itself: metrics.jsonl, the clock behind it, and what holds it back."""
