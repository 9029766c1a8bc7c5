"""What a store or a run holds and how a fit is doing, as JSON and in words."""
