"""What every process shares: configuration, messages, flat buffers, keys, episodes, metrics, the Ray runtime."""
