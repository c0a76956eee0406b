"""Reports about runs: reconstructions, curves, tables and the figures of the curriculum."""
