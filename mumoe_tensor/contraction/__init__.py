"""Plan a contraction from subscripts and sizes (`plan`), run it on arrays (`execute`)."""
