"""Where it runs: what this machine and its cluster offer. Knows nothing of gradients."""
