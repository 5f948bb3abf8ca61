"""What came out of a study: conclusions, tables, figures and the page."""
