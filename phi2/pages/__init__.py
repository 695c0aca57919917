"""HTML that needs nothing else: pages and charts, for the reports about runs and evaluations."""
