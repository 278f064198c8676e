"""One TOML per device: vendor figures, what runs there today, and budgets. Read by edgeomni.hardware."""
