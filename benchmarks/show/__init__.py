"""What every benchmark is shown with: a table in three forms, plots, a page, the READMEs."""
