"""Other ways to the same answer, trained and measured as this project's own."""
