"""Plans: what a run will do and cost, derived from a spec without importing torch."""
