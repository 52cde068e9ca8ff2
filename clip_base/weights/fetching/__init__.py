"""Where published weights are, and how they get here: a server, a shared folder, the Hugging Face hub."""
