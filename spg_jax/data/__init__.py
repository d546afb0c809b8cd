"""Text becomes batches of tokens: tokenizers, prompts and demonstrations."""
