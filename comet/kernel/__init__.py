"""All that is Linux: sockets and limits. Leaves that import nothing of ours."""
