"""Load tests and measurements. They meet a server over HTTP, as any client does."""
