"""Clients that others wrote, each as its own README shows it, against a service that is killed and stopped under them."""
