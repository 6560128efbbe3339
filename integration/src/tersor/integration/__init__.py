"""tersor."""
