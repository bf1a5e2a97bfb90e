"""gptsmith: a small GPT through its whole life, from raw text to export."""
