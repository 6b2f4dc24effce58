"""One script a figure or table of the papers; see README.md."""
