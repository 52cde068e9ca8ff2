"""Building blocks of HTML reports: templates, charts, image crops."""
