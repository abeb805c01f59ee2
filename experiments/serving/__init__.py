"""A finished run's result in use: merged into its base model, exported, or answering a question."""
