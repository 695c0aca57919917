"""The library at work: the whole recipe in miniature, and a chat in the browser."""
