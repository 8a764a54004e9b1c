"""Geometry, schedules and launch rules: what GPU code computes, before any runs."""
