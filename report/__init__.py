"""The report and the benchmark."""
