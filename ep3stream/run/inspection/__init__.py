"""What lies at a path, how a fit is doing, how well rows would be mixed: as JSON and in words."""
