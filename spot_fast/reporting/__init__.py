"""One HTML file about a run: records, figures, tables, page."""
