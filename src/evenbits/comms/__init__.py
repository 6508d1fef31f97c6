"""What travels between stages and replicas: codecs, state between steps, stages, hooks and what they report."""
