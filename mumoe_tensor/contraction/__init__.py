"""Plan a contraction from index names and sizes (`plan`), and run it on arrays (`execute`)."""
