"""Launch parameters measured on real cards, one JSON file per device and op."""
