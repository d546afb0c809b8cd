"""Tokenizers, and batches of prompts and demonstrations as tokens."""
