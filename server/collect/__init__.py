"""How a round's contributions come together: one collector for each way of collecting."""
