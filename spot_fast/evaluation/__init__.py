"""From masks to the figures of a table: metrics, protocols, baselines."""
