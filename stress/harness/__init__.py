"""What the scenarios share: options, models, processes, the watchdog and the report."""
