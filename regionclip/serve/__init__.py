"""`regionclip serve`: a local web page to try a detector on, or two side by side."""
