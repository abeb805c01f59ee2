"""A finished run's result in other people's hands: merged into its base model, or asked a question."""
