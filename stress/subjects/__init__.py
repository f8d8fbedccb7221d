"""Programs that scenarios start, and that end in unusual ways."""
