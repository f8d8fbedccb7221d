"""One module for each family of questions; each defines ``QUESTIONS``."""
