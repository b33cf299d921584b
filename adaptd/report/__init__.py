"""What the daemon tells people: live windows, status tables, charts, the demo page."""
