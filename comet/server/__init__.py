"""The HTTP server: strict requests, waiting clients, orderly ends."""
