"""What the method is compared with and how it is shown: baselines, tables, figures, reports, measurements."""
