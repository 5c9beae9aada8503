"""What is measured after each iteration: one file a benchmark, and the statistics they share."""
