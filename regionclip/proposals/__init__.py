"""Where regions come from: parts that look at images, or a file about them, and return scored boxes."""
