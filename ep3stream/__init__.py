"""Large kernel machines on data that does not fit in memory."""
