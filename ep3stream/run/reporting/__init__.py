"""The report page, and the page that compares runs."""
