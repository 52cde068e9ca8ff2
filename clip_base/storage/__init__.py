"""Files: opening and writing them, what they may hold, who holds them."""
