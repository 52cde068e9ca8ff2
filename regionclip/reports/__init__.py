"""What HTML pages are made of: templates, charts, image crops. Which pages there are is not known here."""
