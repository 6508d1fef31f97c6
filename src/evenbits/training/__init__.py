"""Training with coded traffic: recipes, pipelines, replicas, and one-machine studies with the same numbers."""
